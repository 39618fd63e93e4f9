"""A run folder as a report reads it: options that changed on the way, and files that are damaged or foreign."""

import csv
import json
from pathlib import Path

import pytest
from run_folders import REDUCED, TWO_ARMS, planned, write_run, write_study, write_study_files

import report
import sweep
import train
from studies import runs, store

GONE = object()


def change(path, name, value):
    """Set an entry of a JSON file, or remove it (GONE). name: dotted, with numbers for items; "": the whole content."""
    content = {"": json.loads(Path(path).read_text())}
    *keys, last = [int(key) if key.isdigit() else key for key in ("." + name if name else "").split(".")]
    inner = content
    for key in keys:
        inner = inner[key]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    Path(path).write_text(json.dumps(content[""]))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The finished runs a and b in the working folder, with diagnostics."""
    monkeypatch.chdir(tmp_path)
    for name, fields in (("a", {}), ("b", REDUCED)):
        write_run(Path(name), 1, 2.0, diagnostics=True, **fields)
    return ["a", "b"]


def segment(step, **changed):
    return {"start": "2026-01-01T00:00:00+00:00", "step": step, "dtype": "float32", "changed": changed}


def changes_of(folder, *segments):
    change(Path(folder, "run.json"), "segments", segments)
    return runs.read_run(folder).changes_text


def test_options_that_change_no_result_do_not_count_and_max_iters_does(folders):
    assert runs.read_run("a").changes == []
    more = dict(batch_size=[8, 4], log_interval=[1, 2], device=["cuda", "cpu"], max_iters=[40, 80])
    assert changes_of("a", segment(0), segment(40, **more)) == "max_iters 40 → 80 from step 40"


def test_a_change_whose_steps_were_all_repeated_is_replaced(folders):
    first = [segment(0), segment(20, beta1=[0.9, 0.8], seed=[1, 2])]
    both = "beta1 0.9 → 0.8 from step 20, seed 1 → 2 from step 20"
    assert changes_of("a", *first, segment(20)) == both, "config.json has the new values"
    assert changes_of("a", *first, segment(20, beta1=[0.8, 0.9], seed=[2, 3])) == "seed 1 → 3 from step 20"
    assert changes_of("a", *first, segment(1030, beta1=[0.8, 0.9])) == both + ", beta1 0.8 → 0.9 from step 1,030"


def test_a_report_names_the_runs_whose_options_changed_on_the_way(tiny, command):
    train.train(tiny(out_dir="out/a", max_iters=20))
    train.train(tiny(out_dir="out/a", max_iters=40, weight_decay=0.5, resume=True))
    train.train(tiny(out_dir="out/b"))
    for argv in (["out/b", "out/a"], ["out/a"]):
        code, out, _ = command(report.main, *argv, "--out_dir=compared")
        assert code == 0
        for text in (out, *(Path("compared", name).read_text() for name in ("report.md", "report.html"))):
            (warning,) = [line for line in text.splitlines() if "options changed on the way in" in line]
            assert "Warning: options changed on the way in out/a: " in warning
            assert "weight_decay 0.1 → 0.5 from step 20" in warning and "max_iters 20 → 40 from step 20" in warning
        with open("compared/runs.csv", newline="", encoding="utf-8") as file:
            changed = {row["folder"]: row["changed_options"] for row in csv.DictReader(file)}
        assert changed.pop("out/a").count("from step 20") == 2
        assert {*changed.values()} <= {""}


def test_many_changed_runs_are_counted_and_unfinished_ones_say_so(tmp_path):
    study = write_study(tmp_path / "s", {"a": {}, "b": REDUCED}, lambda arm, seed: 2.0 + seed, seeds=(*range(1, 9),))
    for path in study.glob("*/*/run.json"):
        change(path, "segments", [segment(20, beta1=[0.9, 0.8])])
    (study / "b/seed8/summary.json").unlink()
    folder, _, headlines = report.write_report(report.ReportConfig(runs=(str(study),)))
    assert headlines[-1] == "Warning: options changed on the way in 15 runs; runs.csv has them (changed_options)."
    text = (folder / "report.md").read_text()
    assert "b/seed8: not started" not in text
    assert "step 40 of 40, options changed on the way: beta1 0.9 → 0.8 from step 20" in text


@pytest.mark.parametrize(
    ("name", "entry", "value", "words"),
    [
        ("config.json", "", [1], "a/config.json must hold a JSON object, got list"),
        ("config.json", "n_embd", "wide", "a/config.json: n_embd must be a whole number, got 'wide'"),
        ("config.json", "n_head", 0, "a/config.json: n_head"),
        ("config.json", "objective", None, "a/config.json: objective must be one of"),
        ("run.json", "", {}, "a/run.json lacks parameters.total"),
        ("run.json", "parameters", 3, "a/run.json lacks parameters.total"),
        ("run.json", "parameters.total", "1M", "a/run.json: parameters.total must be a whole number, got '1M'"),
        ("run.json", "data.fingerprint", GONE, "a/run.json lacks data.fingerprint"),
        ("run.json", "data.tokenizer", GONE, "a/run.json lacks data.tokenizer"),
        ("run.json", "versions", GONE, "a/run.json lacks versions.torch"),
        ("run.json", "device", GONE, "a/run.json lacks device"),
        ("run.json", "segments", {}, "a/run.json: segments must be a list of objects"),
        ("run.json", "segments", [1], "a/run.json: segments must be a list of objects"),
        ("run.json", "segments", [{"dtype": 3}], "a/run.json: segments must be a list of objects"),
        ("run.json", "segments", [{"changed": {"beta1": 3}, "step": 1}], "a/run.json: segments must be"),
        ("run.json", "segments", [{"changed": {"beta1": [1, 2]}}], "a/run.json: segments must be"),
        ("summary.json", "val_loss", GONE, "a/summary.json lacks val_loss"),
        ("summary.json", "val_loss", None, "a/summary.json: val_loss must be a finite number, got None"),
        ("summary.json", "val_loss", float("nan"), "a/summary.json: val_loss must be a finite number, got nan"),
        ("summary.json", "tokens", "many", "a/summary.json: tokens must be a whole number, got 'many'"),
        ("summary.json", "train_loss", GONE, "a/summary.json lacks train_loss"),
    ],
)
def test_a_file_that_is_not_a_run_s_is_named_in_one_line(folders, refuses, name, entry, value, words):
    change(Path("a", name), entry, value)
    refuses(report.main, *folders, words=[words])


@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [
        ("eval", "val_loss", GONE, "a/metrics.jsonl: the eval record of step 0 lacks val_loss"),
        ("train", "loss", GONE, "a/metrics.jsonl: the train record of step 20 lacks loss"),
        ("train", "loss", "low", "the train record of step 20 must have a number as loss, got 'low'"),
        ("eval", "val_loss", [2], "the eval record of step 0 must have a number as val_loss, got [2]"),
        ("diagnostics", "attn_logit_max", 3, "must have a list of numbers as attn_logit_max, got 3"),
        ("diagnostics", "attn_logit_max", ["x", 1], "must have a list of numbers as attn_logit_max, got ['x', 1]"),
        (
            "diagnostics",
            "attn_logit_max",
            [1],
            "attn_logit_max must have as many layers in all diagnostics records",
        ),
    ],
)
def test_a_record_without_its_field_is_named_in_one_line(folders, refuses, kind, name, value, words):
    path = Path("a/metrics.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    record = next(record for record in records if record["kind"] == kind)
    record[name] = value
    records = [{key: value for key, value in record.items() if value is not GONE} for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    refuses(report.main, *folders, words=[words])


def test_lines_that_are_no_records_are_left_out(folders, command):
    with open("a/metrics.jsonl", "a") as file:
        file.write('[]\n3\n{"kind": "train"}\n{"step": "x", "kind": "eval"}\nnull\n{"step": 40, "ki')
    Path("a/summary.json").unlink()
    assert command(report.main, *folders)[0] == 0
    assert "a: not finished, step 40 of 40" in Path("out/report/report.md").read_text()


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("arms", GONE, "s/study.json lacks arms"),
        ("arms", [], "s/study.json: arms must be a list that is not empty, got []"),
        ("arms", [3], "s/study.json lacks arms.name"),
        ("arms.0.control", GONE, "s/study.json lacks arms.control"),
        ("arms.1.point", {}, "s/study.json: the point of b,beta1=0.5 must have the grid's fields, got {}"),
        ("arms.1.point.beta1", "x", "s/study.json: beta1 must be a number, got 'x'"),
        ("arms.1.configured", [], "s/study.json: arms.configured must be a JSON object, got []"),
        ("grid", {"beta": [0.5]}, "s/study.json: unknown option 'beta'; did you mean beta"),
        ("grid", {"beta1": 0.5}, "s/study.json: beta1 must be a list that is not empty, got 0.5"),
        ("seeds", ["one"], "s/study.json: seeds must be a whole number, got 'one'"),
        ("name", GONE, "s/study.json lacks name"),
        ("format", 2, "s/study.json must have format 1, got 2"),
    ],
)
def test_a_study_json_that_is_not_a_study_s_is_named_in_one_line(tmp_path, monkeypatch, refuses, entry, value, words):
    monkeypatch.chdir(tmp_path)
    write_study(Path("s"), {"a": {}, "b": REDUCED}, lambda arm, seed, beta1: 2.0, {"beta1": [0.5]}, seeds=[1])
    change("s/study.json", entry, value)
    refuses(report.main, "s", words=[words])
    refuses(sweep.main, "--out_dir=s", "--watch=1", words=[words])


def test_a_damaged_study_json_is_not_overwritten(tiny, refuses):
    argv = [*write_study_files(), "--out_dir=out"]
    store.write_study("out", planned(*argv)[1])
    change("out/study.json", "seeds", GONE)
    before = Path("out/study.json").read_bytes()
    refuses(sweep.main, *argv, words=["out/study.json lacks seeds"])
    assert Path("out/study.json").read_bytes() == before


def test_records_without_their_fields_end_the_view_of_a_study_in_one_line(tiny, refuses):
    argv = [*write_study_files(TWO_ARMS + "seeds = [1]"), "--out_dir=out"]
    (first, _), content = planned(*argv)
    store.write_study("out", content)
    first.folder.mkdir(parents=True)
    path = first.folder / "metrics.jsonl"
    for step, kind, name in ((1, "eval", "val_loss"), (2, "train", "tokens_per_second")):
        path.write_text(json.dumps({"step": step, "kind": kind}) + "\n")
        refuses(sweep.main, *argv, "--watch=1", words=[f"{path}: the {kind} record of step {step} lacks {name}"])
