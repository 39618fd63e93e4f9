"""config/heal_gpt2.py: a pretrained model loses its query matrix, and is fine-tuned beside itself."""

import dataclasses
from pathlib import Path

import pytest
from run_folders import planned, records

import eliminate
import sweep
import train
from engine.files import read_json

STUDY = str(Path(sweep.__file__).parent / "config/heal_gpt2.py")
FEW = ["--dataset=tiny", "--tokens_per_step=128", "--batch_size=8", "--max_iters=4", "--warmup_iters=1"]
FEW += ["--eval_interval=2", "--eval_windows=7", "--dtype=float32", "--seeds=1"]


def test_the_study_begins_with_the_losses_before_and_after_the_fit(tiny, command, refuses):
    refuses(sweep.main, STUDY, "--dry_run", *FEW, words=["there is no checkpoint out/heal/original/ckpt.pt"])
    before = train.train(tiny(out_dir="out/heal/original", n_head=4))
    folders = ["--ckpt=out/heal/original/ckpt.pt", "--out=out/heal/fitted/ckpt.pt"]
    command(eliminate.main, *folders, "--approximate", "--windows=31")
    fitted = train.train(
        tiny(out_dir="out/none", n_head=4, wq_identity=True, init_from="out/heal/fitted/ckpt.pt", eval_only=True)
    )

    status, out, error = command(sweep.main, STUDY, "--dry_run", *FEW)
    assert status == 0, error
    options = [option for option in FEW if not option.startswith("--seeds")]
    runs, _ = planned(STUDY, "--out_dir=out/heal/study", options=options)
    assert [run.config.wq_identity for run in runs[:2]] == [False, True]
    assert {run.config.n_head for run in runs} == {4}  # of the checkpoints, since no file sets it
    losses = []
    for run in runs[:2]:
        status, _, error = command(train.main, *run.arguments, "--eval_windows=31")
        assert status == 0, error
        config, expected = read_json(run.folder / "config.json"), dataclasses.asdict(run.config)
        assert all(config[name] == expected[name] for name in ("n_head", "wq_identity", "vocab_size", "attn_scale"))
        losses.append(records(run.folder, "eval")[0]["val_loss"])
        status, _, error = command(train.main, *run.arguments, "--eval_windows=31", "--max_iters=5")
        assert status == 0, error  # resumed, with the model of its own checkpoint
    assert losses == pytest.approx([before["val_loss"], fitted["val_loss"]], abs=1e-5)
