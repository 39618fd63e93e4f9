import inspect
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import configurator
from bench import BenchConfig
from configurator import FilePath
from prepare_owt import PrepareConfig
from report import ReportConfig
from sample import SampleConfig
from sweep import SweepConfig
from train import TrainConfig

CONFIG = Path(__file__).resolve().parents[1] / "config"
OTHER_COMMANDS = ("study_", "heal_", "basis_transfer")  # whose files train.py does not read
RUNS = sorted(path for path in CONFIG.glob("*.py") if not path.name.startswith(OTHER_COMMANDS))


@dataclass
class Example:
    """Fields of each kind."""

    steps: int = 10  # a whole number
    rate: float = 0.5  # a number
    name: str = "x"  # text
    limit: float | None = None  # a number that may be missing
    label: str | None = "l"  # text that may be missing
    fast: bool = False  # a switch
    maybe: bool | None = None  # a switch that may be left to the program
    # places and choices
    kind: Literal["slow", "quick"] = "slow"  # a choice
    save: tuple[int, ...] = ()  # numbers
    folder: FilePath = "out"  # a folder

    HINTS: ClassVar = {"pace": "the field is rate"}


def parse(*argv):
    return configurator.parse(Example, list(argv))


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return [str(folder / f"{name}.py") for name in files]


def test_files_apply_in_order_and_options_last(tmp_path):
    files = write(tmp_path, a="steps = 1\nrate = 0.1\nname = 'a'", b="steps = 2\nrate = 0.2")
    assert parse("--rate=0.3", *files) == Example(steps=2, rate=0.3, name="a")


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("--rate=2**-5", "rate", 0.03125),
        ("--rate=1", "rate", 1.0),
        ("--rate=0", "rate", 0.0),
        ("--rate=-(1 + 2) * 1e-3", "rate", -0.003),
        ("--steps=480*1024", "steps", 491520),
        ("--steps=6e5", "steps", 600000),
        ("--limit=none", "limit", None),
        ("--limit=3", "limit", 3.0),
        ("--label=None", "label", None),
        ("--label=12", "label", "12"),
        ("--name=none", "name", "none"),
        ("--name=a=b", "name", "a=b"),
        ("--name=", "name", ""),
        ("--fast", "fast", True),
        ("--fast=True", "fast", True),
        ("--fast=false", "fast", False),
        ("--kind=quick", "kind", "quick"),
        ("--save=10,2*10", "save", (10, 20)),
        ("--save=", "save", ()),
        ("--maybe", "maybe", True),
        ("--maybe=none", "maybe", None),
        ("--folder=~/out", "folder", str(Path.home() / "out")),
        ("--name=~/out", "name", "~/out"),
    ],
)
def test_options_are_coerced_to_the_type_of_their_field(option, field, value):
    result = getattr(parse(option), field)
    assert result == value
    assert type(result) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1 - 2**63, 2**63 - 1))
def test_numbers_arrive_as_they_are(rate, steps):
    assert parse(f"--rate={rate!r}", f"--steps={steps}") == Example(rate=rate, steps=steps)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--step=3", ["unknown option --step; did you mean steps?"]),
        ("--zzz=3", ["unknown option --zzz; --help"]),
        ("--steps=1.5", ["--steps must be a whole number, got 1.5"]),
        ("--steps=true", ["--steps must be a whole number, got True"]),
        ("--steps=2**63", ["--steps must be a whole number below 2**63, got 9223372036854775808"]),
        ("--steps=1e400", ["--steps must be a whole number below 2**63, got inf"]),
        ("--steps=" + "9" * 5000, ["--steps must be a whole number, got '999"]),
        ("--rate=fast", ["--rate must be a number, got 'fast'"]),
        ("--rate=nan", ["--rate must be a number, got 'nan'"]),
        ("--rate=1e400", ["--rate must be a finite number, got inf"]),
        ("--rate=10**400", ["--rate must be a finite number, got 1000"]),
        ("--rate=9**9**9", ["--rate must be a number, got '9**9**9'"]),
        ("--rate='a'*10**9", ["--rate must be a number, got"]),
        ("--rate=" + "(" * 5000, ["--rate must be a number, got"]),
        ("--rate=__import__('os')", ["--rate must be a number"]),
        ("--rate=none", ["--rate must be a number"]),
        ("--limit=x", ["--limit must be a number or none, got 'x'"]),
        ("--fast=1", ["--fast must be True or False, got 1"]),
        ("--kind=quik", ["--kind must be one of slow, quick, got 'quik'; did you mean 'quick'?"]),
        ("--save=1,x", ["--save must be a whole number, got 'x'"]),
        ("--steps", ["--steps needs a value"]),
        ("--pace=3", ["unknown option --pace; the field is rate"]),
    ],
)
def test_wrong_options_are_refused_with_the_field(option, words):
    with pytest.raises(ValueError) as refusal:
        parse(option)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\nsteps = 'many'", ["line 2: steps must be a whole number, got 'many'"]),
        ("rate = float('nan')", ["line 1: rate must be a finite number, got nan"]),
        ("import math as m\nrate = m.sqrt(-1)", ["line 2", "ValueError"]),
        ("exec('step = 3')", ["'step'", "did you mean steps?"]),
        ("\n\nstep = 3", ["line 3", "'step'", "did you mean steps?"]),
        ("steps = ", ["line 1", "SyntaxError"]),
        ("\nsteps = undefined", ["line 2", "NameError", "undefined"]),
        ("fast = 1", ["line 1: fast must be True or False, got 1"]),
        ("save = 3", ["line 1: save must be a list, each a whole number, got 3"]),
    ],
)
def test_wrong_files_are_refused_with_file_and_line(tmp_path, text, words):
    (path,) = write(tmp_path, wrong=text)
    with pytest.raises(ValueError) as refusal:
        parse(path)
    assert all(word in str(refusal.value) for word in [path, *words]), refusal.value


def test_files_may_compute_with_names_of_their_own(tmp_path):
    (path,) = write(tmp_path, own="import math\n_base = 4\nrate = math.sqrt(_base)\nsteps: int = 3\nsave = [_base, 5]")
    assert parse(path) == Example(rate=2.0, steps=3, save=(4, 5))


@pytest.mark.parametrize(
    "text", ["exec(open({path!r}).read())", "from sizes_of_mine import *", "globals().update(steps=7, rate=0.25)"]
)
def test_whatever_a_file_brings_into_its_namespace_counts(tmp_path, monkeypatch, text):
    (path,) = write(
        tmp_path, sizes_of_mine="import math\nsteps, rate = 7, 0.25\n_own = 1\ndef half(x):\n    return x / 2"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (outer,) = write(tmp_path, outer=text.format(path=path) + "\nname = 'n'")
    assert parse(outer) == Example(steps=7, rate=0.25, name="n")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1"])
def test_files_in_other_encodings_are_read_as_python_reads_them(tmp_path, encoding):
    declared = "" if encoding == "utf-8-sig" else f"# -*- coding: {encoding} -*-\n"
    (tmp_path / "café.py").write_bytes(f"{declared}# café\nname = 'é'".encode(encoding))
    assert parse(str(tmp_path / "café.py")).name == "é"
    (tmp_path / "wrong.py").write_bytes("# café\nname = 'é'".encode("latin-1"))
    with pytest.raises(ValueError, match=r"wrong\.py, line 2: SyntaxError: .*utf-8"):
        parse(str(tmp_path / "wrong.py"))


def test_a_config_is_found_beside_the_code_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configurator.parse(TrainConfig, ["config/reduced_tied.py"]).wq_identity
    with pytest.raises(ValueError, match=r"folder; a run in it is continued with --out_dir=out/a --resume"):
        Path("out/a").mkdir(parents=True)
        parse("out/a")


def test_a_missing_file_names_a_near_one():
    with pytest.raises(ValueError, match=r"did you mean config/reduced_tied\.py"):
        parse("config/reduced_tide.py")


def test_stored_values_come_before_files_and_options(tmp_path):
    (path,) = write(tmp_path, a="steps = 5")
    stored = json.loads('{"steps": 1, "rate": 0.25, "save": [1, 2]}')
    values = configurator.read(Example, [path, "--name=n"], base=stored)
    assert values == {"steps": 5, "rate": 0.25, "save": (1, 2), "name": "n"}


SCHEMAS = [Example, TrainConfig, BenchConfig, PrepareConfig, SampleConfig, ReportConfig, SweepConfig]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_help_prints_every_field_with_its_meaning(schema, capsys):
    with pytest.raises(SystemExit) as stopped:
        configurator.parse(schema, ["--help"])
    assert not stopped.value.code
    out = capsys.readouterr().out
    assert out.startswith(inspect.getmodule(schema).__doc__.strip() if inspect.getmodule(schema).__doc__ else "")
    lines = out.splitlines()
    for name in configurator.field_types(schema):
        (row,) = [i for i, line in enumerate(lines) if line.startswith(f"  --{name}=")]
        assert len(lines[row + 1].split("[")[0].strip()) > 3, f"{name} has no meaning"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", [None, "quick"])
def test_every_config_is_a_valid_run_alone_and_with_a_size(path, size):
    configurator.parse(TrainConfig, [str(CONFIG / f"{size}.py")] * bool(size) + [str(path)])


def test_table_2_s_columns_differ_in_nothing_but_what_the_paper_says():
    def values(name):
        return vars(configurator.parse(TrainConfig, [str(CONFIG / f"{name}.py")]))

    def difference(one, other):
        return {field for field in values(one) if values(one)[field] != values(other)[field]}

    assert difference("baseline_tied", "reduced_tied") == {"wq_identity", "attn_scale", "weight_decay"}
    assert difference("baseline_untied", "reduced_untied") == {"wq_identity", "attn_scale", "weight_decay"}
    assert difference("baseline_tied", "baseline_untied") == {"tie_weights"}
    assert difference("reduced_tied", "reduced_untied") == {"tie_weights"}


def raise_in_a_library(argv):
    json.loads("{")


def raise_of_the_system(argv):
    os.listdir("not/here")


def raise_over_two_lines(argv):
    raise ValueError("two\nlines")


@pytest.mark.parametrize(
    ("main", "text"),
    [
        (raise_in_a_library, "error: JSONDecodeError: Expecting property name"),
        (raise_of_the_system, "error: not/here: No such file or directory (--debug shows where)"),
        (raise_over_two_lines, "error: two lines"),
    ],
)
def test_a_mistake_is_one_line_and_debug_shows_where(command, main, text):
    status, _, error = command(main)
    assert status == 2 and error.startswith(text) and error.count("\n") == 1
    status, _, error = command(main, "--debug")
    assert status == 2 and "Traceback" in error and main.__name__ in error


def test_divergence_has_a_status_of_its_own_and_a_bug_keeps_its_traceback(command):
    def diverged(argv):
        raise FloatingPointError("loss is nan")

    def wrong(argv):
        return {}["missing"]

    assert command(diverged)[0] == 1
    with pytest.raises(KeyError):
        configurator.run(wrong, [])


def test_output_that_the_terminal_cannot_show_is_not_lost(tmp_path):
    program = "import configurator\nconfigurator.run(lambda argv: print('caf\\u00e9 \\u03a9'), [])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=configurator.ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "caf\\xe9 \\u03a9\n")


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--lr=1e-3", "learning_rate"),
        ("--gradient_accumulation_steps=40", "tokens_per_step"),
        ("--eval_iters=200", "eval_windows"),
        ("--betas=0.9,0.95", "beta1 and beta2"),
        (str(CONFIG / "study_lr.py"), "python sweep.py"),
        (str(CONFIG / "basis_transfer.py"), "python -m theory.basis_transfer"),
    ],
)
def test_the_names_of_other_trainers_point_to_ours(option, hint):
    with pytest.raises(ValueError, match=hint):
        configurator.parse(TrainConfig, [option])


def test_help_has_sections(capsys):
    with pytest.raises(SystemExit):
        configurator.parse(TrainConfig, ["--help"])
    headings = [line for line in capsys.readouterr().out.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == [
        "model:",
        "data:",
        "optimizer:",
        "schedule:",
        "evaluation:",
        "checkpoints:",
        "system:",
        "logging:",
    ]
