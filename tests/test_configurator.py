import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import configurator
from bench import BenchConfig
from prepare_owt import PrepareConfig
from report import ReportConfig
from sample import SampleConfig
from sweep import SweepConfig
from train import TrainConfig

CONFIG = Path(__file__).resolve().parents[1] / "config"
OTHER_COMMANDS = ("study_", "basis_transfer")  # whose files train.py does not read
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
    kind: Literal["slow", "quick"] = "slow"  # a choice
    save: tuple[int, ...] = ()  # numbers


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
    ],
)
def test_options_are_coerced_to_the_type_of_their_field(option, field, value):
    result = getattr(parse(option), field)
    assert result == value
    assert type(result) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers())
def test_numbers_arrive_as_they_are(rate, steps):
    assert parse(f"--rate={rate!r}", f"--steps={steps}") == Example(rate=rate, steps=steps)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--step=3", ["'step'", "did you mean steps?"]),
        ("--zzz=3", ["'zzz'", "--help"]),
        ("--steps=1.5", ["steps must be int", "1.5"]),
        ("--steps=true", ["steps must be int", "bool"]),
        ("--rate=fast", ["rate must be float", "'fast'"]),
        ("--rate=__import__('os')", ["rate must be float"]),
        ("--rate=none", ["rate must be float"]),
        ("--fast=1", ["fast must be bool"]),
        ("--kind=quik", ["kind must be one of slow, quick", "did you mean 'quick'?"]),
        ("--save=1,x", ["save must be int", "'x'"]),
        ("--steps", ["--steps needs a value"]),
    ],
)
def test_wrong_options_are_refused_with_the_field(option, words):
    with pytest.raises(ValueError) as refusal:
        parse(option)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\nsteps = 'many'", ["line 2", "steps must be int", "'many'"]),
        ("\n\nstep = 3", ["line 3", "'step'", "did you mean steps?"]),
        ("steps = ", ["line 1", "SyntaxError"]),
        ("\nsteps = undefined", ["line 2", "NameError", "undefined"]),
        ("fast = 1", ["line 1", "fast must be bool"]),
        ("save = 3", ["line 1", "save must be a list of int"]),
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
    lines = capsys.readouterr().out.splitlines()
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
    reduced = values("reduced_tied")
    assert (reduced["attn_scale"], reduced["weight_decay"], reduced["tokens_per_step"]) == (0.5, 1 / 32, 491_520)
    assert (reduced["max_iters"], reduced["lr_decay_iters"], reduced["learning_rate"]) == (105_000, 600_000, 6e-4)


def test_errors_of_libraries_keep_their_traceback(command):
    def raised_by_a_library(argv):
        json.loads("{")

    with pytest.raises(json.JSONDecodeError):
        configurator.run(raised_by_a_library, [])

    def diverged(argv):
        raise FloatingPointError("loss is nan")

    assert command(diverged)[0] == 1
