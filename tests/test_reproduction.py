"""The plan of reproduce.py, its resumption, its report, and the bundle from which the same report is made."""

import json
import multiprocessing
import sys
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bench
import configurator
import report
import reproduce
import sweep
from configurator import ROOT
from studies import bundle, reproduction, study_file
from train_config import TrainConfig

GPU_STEPS = (65_536, 131_072, 262_144, 491_520)


@given(
    seconds=st.floats(60, 30 * 86_400),
    rate=st.floats(2e3, 5e6),
    on_gpu=st.booleans(),
    transfer=st.floats(0.1, 1e4),
)
def test_a_plan_fits_into_its_budget(seconds, rate, on_gpu, transfer):
    sizes = list(GPU_STEPS) if on_gpu else [4096]
    try:
        plan = reproduction.make_plan(seconds, rate, sizes, transfer)
    except ValueError as error:
        assert "allow at least" in str(error)
        assert reproduction.SHARES["table_2"] * seconds * rate / 4 / sizes[0] < 21 * reproduction.OVERHEAD
        return
    assert sum(plan.seconds.values()) <= seconds
    training = plan.runs * plan.steps * plan.tokens_per_step / rate * reproduction.OVERHEAD
    assert training <= plan.seconds["table_2"] * (1 + 1e-9)
    assert plan.steps * plan.tokens_per_step <= reproduction.PAPER_TOKENS
    assert plan.transfer_steps == 20 or plan.transfer_steps / transfer <= plan.seconds["section_5_1"]
    assert plan.tokens_per_step in sizes
    cfg = configurator.parse(TrainConfig, [f"--block_size={64}", "--batch_size=1", *plan.schedule.split()])
    assert cfg.learning_rate_at(cfg.max_iters) == 0
    assert cfg.max_iters == plan.steps


@pytest.mark.parametrize("small", [False, True])
def test_the_studies_of_a_plan_are_studies(tmp_path, small):
    plan = reproduction.make_plan(3600, 60_000, [4096], 100)
    assert plan.seeds > 1 and plan.queries
    n_runs = set()
    for name, text in reproduction.studies(plan, small).items():
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        study = study_file.read_file(path)
        n_runs |= {(arm, seed) for arm in study.arms for seed in study.seeds}
        for arm in study.arms:
            options = study.arms[arm].split()
            cfg = configurator.parse(TrainConfig, [str(ROOT / options[0]), *options[1:]])
            assert cfg.attn_logit_std == ("small" if small else None)
    assert len(n_runs) == plan.runs


def test_every_architecture_is_made_of_config_files():
    for name in reproduction.ARCHITECTURES:
        assert all((ROOT / "config" / f"{part}.py").exists() for part in name.split())


def test_more_time_means_more_runs_and_longer_ones():
    plans = [reproduction.make_plan(seconds, 60_000, [4096], 100) for seconds in (120, 900, 9 * 3600)]
    assert [plan.runs for plan in plans] == sorted(plan.runs for plan in plans)
    assert plans[0].runs == 4 and plans[-1].seeds == 5
    assert plans[-1].steps > plans[0].steps


@pytest.mark.parametrize("rate", [0.5, 12.0, 800.0])
def test_the_speed_of_section_5_1_does_not_depend_on_how_long_a_process_takes_to_begin(rate, monkeypatch, tmp_path):
    run = reproduce.Reproduction(reproduce.ReproduceConfig(minutes=10, out_dir=str(tmp_path), device="cpu"))
    begins = iter([7.3, 7.0, 7.4, 6.9, 7.1, 7.2, 7.0])  # seconds, which vary more than a few steps take

    def took(part, *arguments, seconds):
        return 0, next(begins) + int(arguments[2].removeprefix("--steps=")) / rate

    monkeypatch.setattr(run, "run", took)
    assert run.transfer_speed() == pytest.approx(rate, rel=0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "how long may it take"),
        (["--minutes=3", "--hours=1"], "minutes and hours are all budgets"),
        (["--minutes=0"], "minutes must be positive"),
        (["--preset=paper"], "--preset=paper only plans"),
        (["--bundle=x.tar.gz", "--out_dir=none"], "there is no folder none"),
    ],
)
def test_mistakes_are_one_line(arguments, words, refuses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses(reproduce.main, *arguments, words=[words])


def run_in_a_fork(self, part, *arguments, seconds=None):
    """Reproduction.run without the seconds of torch's import, where the command is one of two."""
    mains = {"bench.py": bench.main, "sweep.py": sweep.main}
    if arguments[0] not in mains or sys.platform != "linux":
        return REALLY_RUN(self, part, *arguments, seconds=seconds)
    argv, began = [*arguments[1:]], time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=configurator.run, args=(mains[arguments[0]], argv))
    process.start()
    process.join(120)
    return process.exitcode, time.monotonic() - began


REALLY_RUN = reproduce.Reproduction.run


@pytest.mark.slow
def test_the_whole_of_it_is_resumed_and_its_bundle_gives_the_same_report(tmp_path, monkeypatch, forked):
    monkeypatch.chdir(tmp_path)
    size = [*"--n_layer=1 --n_embd=16 --n_head=2 --block_size=16 --tokens_per_step=128 --batch_size=8".split()]
    size += [
        "--vocab_size=320",
        "--eval_windows=8",
        "--dataset=tiny",
        f"--data_dir={tmp_path}",
        "--lr_decay_iters=none",
    ]
    from conftest import write_dataset

    write_dataset(tmp_path / "tiny")
    monkeypatch.setattr(reproduce.Reproduction, "size", property(lambda self: size))
    monkeypatch.setattr(reproduce.Reproduction, "run", run_in_a_fork)
    monkeypatch.setattr(reproduce.Reproduction, "prepare", lambda self: None)
    monkeypatch.setattr(reproduce.Reproduction, "measure_speed", lambda self: {"training": 500.0, "transfer": 10.0})
    monkeypatch.setattr(reproduction, "ARCHITECTURES", ("baseline_tied", "modern reduced_tied"))
    monkeypatch.setattr(reproduce.Reproduction, "transfer_options", transfer_options)
    works = reproduce.Reproduction.works

    def works_here(self, plan):  # its child would not have this test's changes
        self.state.setdefault("works", {})
        self.try_architectures()
        return works(self, plan)

    monkeypatch.setattr(reproduce.Reproduction, "works", works_here)
    cfg = reproduce.ReproduceConfig(minutes=10, out_dir="out/all")  # a busy machine may take them

    def interrupted(self, plan):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reproduce.Reproduction, "section_5_1", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reproduce.reproduce(cfg)
    before = json.loads(Path("out/all/state.json").read_text())
    assert set(before["parts"]) == {"works", "speed", "table_2"}
    assert reproduce.reproduce(cfg) == 0
    after = json.loads(Path("out/all/state.json").read_text())
    assert {name: after["parts"][name] for name in before["parts"]} == before["parts"]
    assert "section_5_1" in after["parts"]
    assert after["parts"]["works"]["rows"]["baseline_tied"] == dict.fromkeys(
        ("trains", "evaluates", "decodes", "resumes"), "yes"
    )
    text = Path("out/all/report.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles[0] == "## Section 5.1: is the change of basis linear?"  # the newest first
    assert "Not finished yet" not in text

    reproduce.main(["--bundle=mine.tar.gz", "--out_dir=out/all"])
    with tarfile.open("mine.tar.gz") as archive:
        names = archive.getnames()
        archive.extractall("elsewhere", filter="data")
    assert not any(name.endswith(".pt") for name in names)
    tables = []
    for folder in ("out/all/table_2", "elsewhere/table_2"):
        _, table, headlines = report.write_report(report.ReportConfig(runs=(folder,), out_dir=f"{folder}-report"))
        tables.append((table.markdown(), headlines))
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_two_processes_that_share_the_parameters_are_tried_like_several_gpus(tmp_path, monkeypatch):
    cfg = reproduce.ReproduceConfig(minutes=10, out_dir=str(tmp_path / "out"), device="cpu")
    size = "--n_layer=1 --n_embd=16 --n_head=2 --block_size=16 --vocab_size=320 --device=cpu".split()
    monkeypatch.setattr(reproduce.Reproduction, "size", property(lambda self: size))
    assert reproduce.Reproduction(cfg).try_several_gpus(2) == {"trains": "yes"}
    monkeypatch.setattr(reproduce.Reproduction, "size", property(lambda self: [*size, "--n_kv_head=3"]))
    assert "n_kv_head=3" in reproduce.Reproduction(cfg).try_several_gpus(2)["trains"]


def test_a_gpu_of_little_memory_and_several_are_tried_where_they_are(tmp_path, monkeypatch):
    run = reproduce.Reproduction(reproduce.ReproduceConfig(minutes=10, out_dir=str(tmp_path), device="cpu"))
    assert run.trials == list(reproduction.ARCHITECTURES)
    run.on_gpu = True
    monkeypatch.setattr(reproduce.torch.cuda, "device_count", lambda: 2)
    assert run.trials[len(reproduction.ARCHITECTURES) :] == [reproduce.OUT_OF_MEMORY, reproduce.SHARDED]


def transfer_options(self, steps):
    return [f"--steps={steps}", "--seeds=0", "--h=8", "--batch=32", "--linear_samples=1000", "--test_samples=100"]


def test_a_bundle_refuses_names_that_not_every_system_takes(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a b.json").write_text("{}")
    with pytest.raises(ValueError, match="rename it"):
        bundle.write(tmp_path, tmp_path / "x.tar.gz")
