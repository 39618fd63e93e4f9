"""A study's file and what it becomes: points, arms, runs with their commands, the jobs of an array."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from run_folders import TWO_ARMS, planned, write_study_files

import configurator
import sweep
from engine import checkpoint, resuming, run_files
from engine.flops import cost
from studies.plan import runs_of_array_job
from train_config import TrainConfig

ROOT = Path(sweep.__file__).parent
STUDIES = sorted(ROOT.glob("config/study_*.py"))
SIZES = pytest.mark.parametrize("size", [[], ["config/quick.py"]], ids=["paper", "quick"])

NORMS = ("layernorm", "rmsnorm", "none")
ONE_ARM = "arms = {'a': ''}\ncontrol = 'a'\n"
GRID = ONE_ARM + "def grid(size):\n    return "
WIDTHS = """
def grid(size):
    return [dict(n_embd=size.n_embd * factor, n_head=size.n_head * factor) for factor in (1, 2)]
"""


@pytest.fixture
def files(tiny):
    return write_study_files


def test_the_arms_of_a_seed_come_before_the_next_seed_and_pairs_side_by_side(files):
    grid = "grid = {'weight_decay': [0, 2**-5], 'attn_scale': [0.5, 1]}\nseeds = [7, 3]\nsettings = '--beta1=0.5'"
    runs, content = planned(*files(TWO_ARMS + grid), options=["--max_iters=8"])
    assert [run.seed for run in runs] == [7] * 8 + [3] * 8
    assert [run.name for run in runs[:4]] == [
        "baseline,weight_decay=0,attn_scale=0.5",
        "reduced,weight_decay=0,attn_scale=0.5",
        "baseline,weight_decay=0,attn_scale=1",
        "reduced,weight_decay=0,attn_scale=1",
    ]
    for run, entry in zip(runs, content["arms"] * 2, strict=True):
        values = {**entry["point"], "seed": run.seed, "data_seed": run.seed, "max_iters": 8, "beta1": 0.5, "n_embd": 16}
        assert {name: getattr(run.config, name) for name in values} == values
        assert run.config.wq_identity == (entry["arm"] == "reduced")
        assert run.config == TrainConfig(**configurator.read(TrainConfig, run.arguments)), "what the process will read"
        assert run.config.out_dir == str(run.folder) == f"out/my_study-tiny/{run.name}/seed{run.seed}"
    assert content["grid"] == {"weight_decay": [0.0, 2**-5], "attn_scale": [0.5, 1.0]}
    assert content["name"] == "my_study-tiny"
    for entry in content["arms"]:  # the arm's default settings of the grid's fields, set by its own arguments or not
        own = {"baseline": (0.1, 1.0), "reduced": (0.1, 0.5)}[entry["arm"]]
        assert entry["configured"] == dict(zip(("weight_decay", "attn_scale"), own, strict=True))


def test_a_grid_is_a_function_of_the_size_and_the_command_line(files):
    text = """
arms = {"a": "--mlp_ratio={mlp_ratio}/2", "b": "--wq_identity"}
control = {"b": "a"}
seeds = [1]
_factors = (0.5, 2)

def grid(size):
    return [
        dict(n_embd=size.n_embd * factor, n_head=int(size.n_head * factor), save_steps=[size.max_iters // 2, 3])
        for factor in _factors
    ]
"""
    runs, content = planned(*files(text, n_embd=32, n_head=4), options=["--max_iters=8"])
    assert [(run.config.n_embd, run.config.mlp_ratio) for run in runs] == [(16, 2), (16, 4), (64, 2), (64, 4)]
    assert [run.config.n_head for run in runs] == [2, 2, 8, 8]
    assert {run.config.save_steps for run in runs} == {(4, 3)}
    assert [run.name for run in runs] == ["a,n_embd=16", "b,n_embd=16", "a,n_embd=64", "b,n_embd=64"]
    assert content["grid"] == {"n_embd": [16, 64]}
    assert [(entry["point"], entry["control"]) for entry in content["arms"][1:3]] == [
        ({"n_embd": 16}, "a"),
        ({"n_embd": 64}, "a"),
    ]
    assert content["arms"][3]["arguments"] == [
        *("tiny.py", "--wq_identity", "--n_embd=64", "--n_head=8", "--save_steps=4,3", "--max_iters=8")
    ]
    assert content["arms"][3]["configured"] == {"n_embd": 32}


def test_a_function_and_a_dict_of_the_same_values_are_the_same_study(files):
    by_dict = planned(*files(TWO_ARMS + "grid = {'beta1': [0.5, 0.25]}"))
    by_function = planned(*files(TWO_ARMS + "def grid(size): return [{'beta1': 0.5}, {'beta1': 0.25}]"))
    assert by_dict[1] == by_function[1]
    assert [run.config for run in by_dict[0]] == [run.config for run in by_function[0]]


@pytest.mark.parametrize("array_size", range(1, 14))
def test_the_jobs_of_an_array_have_every_run_once_and_all_arms_together(files, array_size):
    runs, content = planned(*files(TWO_ARMS + "grid = {'beta1': [0.5, 0.9]}"))
    jobs = [runs_of_array_job(runs, content["arms"], index, array_size) for index in range(array_size)]
    assert sorted(run.label for job in jobs for run in job) == sorted(run.label for run in runs)
    sizes = [len(job) for job in jobs]
    assert max(sizes) - min(sizes) <= (2 if array_size <= 6 else 1)
    for job in jobs if array_size <= 6 else ():
        groups = {}
        for run in job:
            arm, _, point = run.name.partition(",")
            groups.setdefault((point, run.seed), set()).add(arm)
        assert set(map(frozenset, groups.values())) == {frozenset({"baseline", "reduced"})}


@pytest.mark.parametrize("array_size", [2, 3, 4, 6])
def test_a_job_has_whole_pairs_where_each_arm_has_its_own_control(files, array_size):
    arms = {f"{name}-a": f"--norm={name}" for name in NORMS} | {
        f"{name}-b": f"--norm={name} --wq_identity" for name in NORMS
    }
    control = {f"{name}-b": f"{name}-a" for name in NORMS}
    runs, content = planned(*files(f"arms = {arms}\ncontrol = {control}\nseeds = [1, 2]"))
    jobs = [runs_of_array_job(runs, content["arms"], index, array_size) for index in range(array_size)]
    assert sorted(run.label for job in jobs for run in job) == sorted(run.label for run in runs)
    for job in jobs:
        assert {(run.seed, run.name[:-2]) for run in job if run.name[-1] == "a"} == {
            (run.seed, run.name[:-2]) for run in job if run.name[-1] == "b"
        }


def test_arms_that_are_each_other_s_control_are_in_one_job(files):
    two, three = "{'a': '', 'b': '--wq_identity'}", "{'a': '', 'b': '--wq_identity', 'c': '--wk_identity'}"
    for arms, control, names in (
        (two, "{'a': 'b', 'b': 'a'}", ["a", "b"]),
        (three, "{'a': 'b', 'b': 'c', 'c': 'b'}", ["a", "b", "c"]),  # the first leads into the ring
    ):
        runs, content = planned(*files(f"arms = {arms}\ncontrol = {control}"))
        jobs = [runs_of_array_job(runs, content["arms"], index, 3) for index in range(3)]
        assert [[run.name for run in job] for job in jobs] == [names] * 3


@pytest.fixture
def root(monkeypatch):
    """In the repository's folder, where no run is that a study would branch from."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(resuming, "branch_options", lambda given: {})
    monkeypatch.setattr(checkpoint, "step", lambda path: 0)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
@SIZES
def test_every_study_is_valid_at_the_paper_s_size_and_at_the_quick_one(path, size, root):
    runs, content = planned(f"config/{path.name}", *size)
    controls = {entry["arm"]: entry["control"] for entry in content["arms"]}
    assert {*controls.values()} <= {*controls}
    objective = dict({(run.name.partition(",")[0], run.config.objective) for run in runs})
    assert all(objective[arm] == objective[control] for arm, control in controls.items()), "comparable losses"
    assert len(runs) == len(content["arms"]) * len(content["seeds"])
    n_seeds = {"demo": 1} | dict.fromkeys("table2 untied params query length length_trunk".split(), 5)
    assert len(content["seeds"]) == n_seeds.get(path.stem.removeprefix("study_"), 3)
    assert f"# python sweep.py config/{path.name} config/quick.py" in " ".join(path.read_text().split())


def test_the_example_of_the_readme_is_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "my_study.py").write_text(
        re.search(r"```python\n(.*?)```", Path("studies/README.md").read_text(), re.S)[1]
    )
    runs, content = planned(str(tmp_path / "my_study.py"), "config/quick.py")
    assert content["grid"] == {"n_embd": [128, 256]}
    assert {run.config.n_head for run in runs} == {4, 8}


@SIZES
def test_arms_that_are_compared_at_equal_parameters_have_them(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs, content = planned("config/study_params.py", *size, "--seeds=1")
    total = {run.name: cost(run.config.model_config()).total for run in runs}
    assert total["baseline"] == total["reduced_mlp4p5"]
    assert total["reduced"] == total["baseline_mlp3p5"] < total["baseline"]
    assert total["baseline_narrow"] == pytest.approx(total["reduced"], rel=0.025)
    for entry in content["arms"]:
        assert total[entry["name"]] == pytest.approx(total[entry["control"]], rel=0.025)
    widths = {run.name: run.config.n_embd for run in runs}
    assert widths["baseline_narrow"] == (124 if size else 744)


@SIZES
def test_what_goes_with_a_grid_s_axis_is_in_proportion(size, root):
    runs = [run.config for run in planned("config/study_width.py", *size)[0]]
    assert len({run.n_embd for run in runs}) == 3
    assert len({(run.n_embd / run.n_head, run.n_embd * run.learning_rate) for run in runs}) == 1


@SIZES
def test_every_length_branches_from_the_same_arm_and_seed_where_its_decay_begins(size, root):
    trunks, _ = planned("config/study_length_trunk.py", *size, "--out_dir=out/length_trunk")
    trunks = {str(run.folder): run.config for run in trunks}
    runs = [run.config for run in planned("config/study_length.py", *size)[0]]
    assert len({run.max_iters for run in runs}) == 5
    for run in runs:
        place, _, step = run.branch_from.removesuffix(".pt").rpartition("/step_")
        assert run.max_iters - run.decay_iters == int(step) > run.warmup_iters
        assert int(step) in trunks[place].save_steps
        own, other = map(run_files.identity, map(dataclasses.asdict, (run, trunks[place])))
        assert {name for name in own if own[name] != other[name]} == {"schedule", "decay_iters", "max_iters"}


def test_a_function_may_return_a_grid_of_several_axes(files):
    values = "{'weight_decay': [0, WIDTH / 160], 'attn_scale': [0.5, 1]}"
    plans = [
        planned(*files(TWO_ARMS + "grid = " + values.replace("WIDTH", "16"))),
        planned(*files(TWO_ARMS + "def grid(size):\n    return " + values.replace("WIDTH", "size.n_embd"))),
    ]
    (runs, content), (other_runs, other_content) = plans
    assert [run.arguments for run in runs] == [run.arguments for run in other_runs]
    assert content == other_content


@SIZES
def test_the_weight_decays_of_a_study_do_as_much_at_any_size_as_at_the_paper_s(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs, _ = planned("config/study_wd_scale.py", *size, "--seeds=1")
    shrunk = {round(run.config.weight_decay * run.config.learning_rate_sum(), 3) for run in runs}
    assert sorted(shrunk) == pytest.approx([0, 0.954, 1.908, 3.816, 6.106], abs=2e-3)
    if not size:
        assert {run.config.weight_decay for run in runs} == {0, 2**-6, 2**-5, 2**-4, 0.1}


def test_runs_have_names_of_their_own_in_wandb(files):
    runs, _ = planned(*files(), options=["--wandb_log"])
    names = [TrainConfig(**configurator.read(TrainConfig, run.arguments)).wandb_run_name for run in runs]
    assert names == [f"my_study-tiny/{run.name}/seed{run.seed}" for run in runs]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arms = {'a': ''}", ["my_study.py", "does not set arms and control"]),
        ("arms = ['a']\ncontrol = 'a'", ["line 1", "arms must be a dict such as"]),
        *(
            (f"arms = {{{arm!r}: ''}}\ncontrol = {arm!r}", ["line 1: an arm must be named by letters", f"got {arm!r}"])
            for arm in ("a/b", "..", ".", "...", "", "a\n", "a b", "../a", "a\0", 5)
        ),
        (f"arms = {{'{'é' * 128}': ''}}\ncontrol = '{'é' * 128}'", ["the arm éé", "at most 255 bytes", "got 256"]),
        (
            f"arms = {{'a': '', '{'b' * 247}': ''}}\ncontrol = 'a'\ngrid = {{'beta1': [0.5]}}",
            ["my_study.py: the arm bbb", "at most 255 bytes at each point of the grid, got 257"],
        ),
        (ONE_ARM + "grid = {'init_from': ['../x.pt']}", ["the arm a must have a folder's name without /", "../x.pt"]),
        (ONE_ARM + "grid = {'init_from': ['x\\ny']}", ["the arm a must have a folder's name without / and line feeds"]),
        ("arms = {'a': ''}\ncontrol = 'b'", ["line 2", "control must be among the arms a", "'b'"]),
        ("arms = {'a': ''}\ncontrol = {'a': 'b'}", ["line 2", "control must be among the arms a"]),
        (ONE_ARM + "seed = [1]", ["line 3", "'seed'", "did you mean seeds?"]),
        (ONE_ARM + "where = {}", ["line 3", "'where'"]),
        (ONE_ARM + "seeds = [1, 1]", ["line 3", "each seed once", "'1,1'"]),
        (ONE_ARM + "seeds = 3", ["line 3", "seeds must be a list"]),
        (ONE_ARM + "settings = 3", ["line 3", "settings must be a text"]),
        (ONE_ARM + "settings = '--n_layer={n_layers}'", ["line 3", "settings", "{n_layers}", "field of train.py"]),
        ("arms = {'a': '--n_layer={'}\ncontrol = 'a'", ["line 1", "cannot read '--n_layer={' in arms"]),
        ("arms = {'a': '--dataset=\"x'}\ncontrol = 'a'", ["line 1", "cannot read", "quotation"]),
        (ONE_ARM + "grid = {'n_layer': 3}", ["line 3", "field -> list"]),
        (ONE_ARM + "grid = {'n_layer': []}", ["line 3", "field -> list"]),
        (ONE_ARM + "grid = {'n_layer': {'2': '--n_head=1'}}", ["line 3", "field -> list", "function of the size"]),
        (ONE_ARM + "grid = {'n_layers': [3]}", ["line 3: grid", "did you mean n_layer?"]),
        (ONE_ARM + "grid = {5: [3]}", ["line 3: grid", "'5'"]),
        (ONE_ARM + "grid = {'n_layer': [3, 'x']}", ["line 3: grid: n_layer must be", "'x'"]),
        (ONE_ARM + "grid = {'n_layer': ['{n_layer}*2']}", ["line 3: grid: n_layer must be", "'{n_layer}*2'"]),
        (ONE_ARM + "grid = {'seed': [3]}", ["line 3: grid", "seed", "the sweep sets"]),
        (ONE_ARM + "grid = {'n_layer': [3, 3.0]}", ["line 3: grid", "each point once", "n_layer=3"]),
        (ONE_ARM + "grid = {'n_head': [2, 3]}", ["a,n_head=3: ", "n_embd=16", "n_head=3"]),
        (
            GRID + "[dict(n_embd=size.n_embed)]",
            ["line 3: grid(size): unknown option 'n_embed'", "did you mean n_embd?"],
        ),
        (GRID + "[dict(n_layer=1 // 0)]", ["line 3: grid(size) raised ZeroDivisionError"]),
        (ONE_ARM + "def grid(): return []", ["line 3: grid(size) raised TypeError"]),
        (GRID + "{'n_layer': 1}", ["line 3: grid(size) must return a list of dicts", "{'n_layer': 1}"]),
        (GRID + "{'n_layer': []}", ["line 3: grid(size) must return a list of dicts", "{'n_layer': []}"]),
        (GRID + "[]", ["line 3: grid(size) must return a list of dicts", "got []"]),
        (GRID + "[{}]", ["line 3: grid(size) must return a list of dicts", "got [{}]"]),
        (
            GRID + "[dict(n_layer=1, n_head=1), dict(n_head=2, n_layer=2)]",
            ["line 3: grid(size)", "the same keys in one order", "n_layer, n_head and n_head, n_layer"],
        ),
        (GRID + "[dict(n_layer=1, n_head=1), dict(n_layer=1, n_head=2)]", ["line 3", "each point once", "n_layer=1"]),
        (GRID + "[dict(n_layer='x')]", ["line 3: grid: n_layer must be", "'x'"]),
        (GRID + "[dict(n_layer=1, out_dir='x')]", ["line 3: grid", "out_dir", "the sweep sets"]),
        ("arms = {'a': '--n_head'}\ncontrol = 'a'", ["a: ", "--n_head needs a value"]),
        ("arms = {'a': 'nowhere.py'}\ncontrol = 'a'", ["a: ", "nowhere.py"]),
        ("arms = {'a': '', 'b': '--beta1=0.9'}\ncontrol = 'a'", ["a/seed1 and b/seed1 are the same run"]),
        (
            "arms = {'a': '--attn_logit_std=small', 'b': '--attn_logit_std=small --attn_scale=2'}\ncontrol = 'a'",
            ["a/seed1 and b/seed1 are the same run"],
        ),
        ("arms = {'a': '', 'b': '--n_layer=1'}\ncontrol = 'a'\nsettings = '--n_layer=4'", ["are the same run"]),
    ],
)
def test_mistakes_in_a_study_end_in_one_line_before_anything_runs(files, refuses, text, words):
    refuses(sweep.main, *files(text), words=words)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed=3"], ["--seed cannot be an option", "the sweep sets"]),
        (["--resume"], ["--resume cannot be an option", "the sweep sets"]),
        (["--n_embd=32"], ["--n_embd is in the grid of my_study.py"]),
        (["--n_head=4"], ["--n_head is in the grid of my_study.py"]),
        (["--job=2"], ["--job;", "did you mean jobs?"]),
        (["--learning_rat=1"], ["--learning_rat;", "did you mean learning_rate?"]),
        (["--learning_rate=0"], ["baseline,n_embd=16: learning_rate must be positive"]),
        (["--jobs=0"], ["jobs must be positive"]),
        (["--array_size=0"], ["array_size must be positive"]),
        (["--array_index=2", "--array_size=2"], ["array_index must be", "array_size - 1 = 1, got 2"]),
        (["--index=2", "--of=2"], ["array_index must be", "got 2"]),
        (["--seeds=1,1"], ["each seed once"]),
        (["--watch=-1"], ["watch must be"]),
        (["--dataset=missing"], ["data/missing/train.bin"]),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_line(files, refuses, options, words):
    refuses(sweep.main, *files(TWO_ARMS + WIDTHS), *options, words=words)
    assert not Path("out").exists()


def test_the_longest_name_is_that_of_a_folder(files):
    name = "a" * 245  # and ",beta1=0.5"
    runs, _ = planned(*files(f"arms = {{'{name}': ''}}\ncontrol = '{name}'\ngrid = {{'beta1': [0.5]}}\nseeds = [1]"))
    assert len(runs[0].name) == 255
    runs[0].folder.mkdir(parents=True)


def test_a_study_beside_the_repository_s_files_is_found_from_another_folder(tmp_path, monkeypatch, command, refuses):
    monkeypatch.chdir(tmp_path)
    code, out, _ = command(sweep.main, "config/study_which.py", "config/quick.py", "--seeds=1", "--dry_run")
    commands = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
    assert code == 0 and commands
    for _, script, *arguments in commands:
        assert Path(script).resolve() == ROOT / "train.py"
        assert TrainConfig(**configurator.read(TrainConfig, arguments)).n_embd == 128
    assert list(tmp_path.iterdir()) == []
    refuses(sweep.main, "config/study_lrr.py", words=["config/study_lrr.py", "did you mean config/study_lr.py?"])
    (tmp_path / "config").mkdir()
    (tmp_path / "config/study_lr.py").symlink_to("/proc/self/mem")  # exists, and cannot be read
    code, _, error = command(sweep.main, "config/study_lr.py")
    assert code == 2 and error.startswith("error: cannot read the config file config/study_lr.py")
    assert "did you mean config/study_lr.py" not in error


def test_the_size_s_file_does_not_come_first(files, refuses):
    refuses(sweep.main, *reversed(files()), words=["tiny.py", "not a study", "name the study before its size"])
    refuses(sweep.main, words=["python sweep.py config/study_"])
    refuses(sweep.main, "--out_dir=out", words=["python sweep.py config/study_"])
