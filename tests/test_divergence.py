"""A loss that rises and stays finite: the good checkpoint stays, and the user is told."""

import math

import pytest
import torch

import train
from engine import checkpoint, divergence, run_files


def test_the_checkpoint_from_before_the_rise_is_kept(tmp_path):
    watch = divergence.Watch(tmp_path, vocab_size=64)
    latest, good = tmp_path / run_files.CHECKPOINT, tmp_path / run_files.LAST_GOOD
    high, low = math.log(64) + 1.01, math.log(64) + 0.99
    latest.write_text("good")
    assert [watch.warning(loss) for loss in (low, high, high)] == [None] * 3
    assert good.read_text() == "good"
    watch.warning(low)
    assert not good.exists(), "it came back"
    watch.warning(high)
    latest.unlink()
    latest.write_text("bad")
    warnings = [watch.warning(high) for _ in range(2 * divergence.PATIENCE)]
    assert good.read_text() == "good"
    (warning,) = [text for text in warnings if text]
    assert str(good) in warning and "--resume" in warning and "smaller learning_rate" in warning


def test_a_run_that_diverges_says_so_and_its_good_checkpoint_is_usable(tiny, monkeypatch, capsys):
    original = train.Trainer.update

    def explode(trainer, *batch):
        done = original(trainer, *batch)
        if trainer.step == 15:
            with torch.no_grad():
                trainer.model.lm_head.weight.mul_(300)
        return done

    monkeypatch.setattr(train.Trainer, "update", explode)
    train.train(tiny(max_iters=30))
    out = capsys.readouterr().out
    assert out.count("warning: the training loss was above 5.16 (a uniform guess + 1) in 5 records") == 1
    state = checkpoint.load("run/last_good.pt")
    assert state["step"] == 10 and all(tensor.abs().max() < 10 for tensor in state["model"].values())


def test_a_run_that_learns_hears_nothing(tiny, capsys):
    train.train(tiny())
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("loss", "log_interval", "before"), [(math.inf, 3, 0), (math.nan, 5, 3), (math.nan, 1, 0)])
def test_what_is_not_finite_is_kept_with_its_batch(tiny, monkeypatch, loss, log_interval, before):
    original = train.Trainer.update

    def poison(trainer, *batch):
        done = original(trainer, *batch)
        if trainer.step == 4:
            trainer.unchecked[-1] = (torch.tensor(loss), torch.tensor(1.0))
        return done

    monkeypatch.setattr(train.Trainer, "update", poison)
    cfg = tiny(log_interval=log_interval)
    with pytest.raises(FloatingPointError, match=r"step 4: loss .*--resume and a smaller learning_rate"):
        train.train(cfg)
    found = train.read_json("run/nonfinite.json")
    assert (found["step"], found["loss"], len(found["before"])) == (4, str(loss), before)
    assert found["offsets"] == train.Trainer(tiny(out_dir="other")).offsets(3).tolist()
