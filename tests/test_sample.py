from pathlib import Path

import pytest
import torch

import sample
import train
from engine import checkpoint


@pytest.fixture
def run(tiny):
    """A run folder whose model has seen a little of the byte tokenizer's text."""
    train.train(tiny(vocab_size=320, max_iters=3, out_dir="out/run", batch_size=4))
    return "out/run"


def options(**changes):
    return sample.SampleConfig(
        **{"out_dir": "out/run", "num_samples": 2, "max_new_tokens": 20, "dtype": "float32", **changes}
    )


def test_samples_begin_with_the_prompt_and_go_past_the_block_size(run):
    texts = sample.sample(options(start="def f", max_new_tokens=60))
    assert len(texts) == 2
    assert all(text.startswith("def f") for text in texts)


def test_greedy_samples_are_the_model_s_likeliest_tokens(run):
    (text,) = sample.sample(options(start="abc", temperature=0.0, num_samples=1))
    model = checkpoint.build_model(checkpoint.load("out/run/ckpt.pt")).eval()
    idx = torch.tensor([list(b"abc")])
    for _ in range(20):
        logits, _ = model(idx[:, -16:])
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert text == bytes(token for token in idx[0].tolist() if token < 256).decode(errors="replace")


def test_the_seed_decides_the_samples(run):
    assert sample.sample(options(seed=1)) == sample.sample(options(seed=1))
    assert sample.sample(options(seed=1)) != sample.sample(options(seed=2))
    first, second = sample.sample(options(seed=1))
    assert first != second


def test_a_prompt_from_a_file_and_an_empty_one(run, tmp_path):
    Path("prompt.txt").write_text("import ünicode")
    assert sample.sample(options(start="FILE:prompt.txt"))[0].startswith("import ünicode")
    assert sample.sample(options(start=""))


def test_without_a_folder_the_newest_run_is_sampled(run, tiny, command):
    train.train(tiny(vocab_size=320, max_iters=1, out_dir="out/newer/run"))
    status, out, error = command(sample.main, "--max_new_tokens=3", "--num_samples=1")
    assert status == 0
    assert "out/newer/run/ckpt.pt, step 1" in error
    assert out.endswith("---------------\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out_dir=nowhere"], ["nowhere/ckpt.pt"]),
        (["--out_dir=out/run", "--ckpt=step_9.pt"], ["step_9.pt"]),
        (["--out_dir=out/run", "--start=FILE:nothing.txt"], ["nothing.txt"]),
        (["--out_dir=out/run", "--temperature=-1"], ["temperature"]),
        (["--out_dir=out/run", "--top_p=1.5"], ["top_p"]),
        (["--out_dir=out/run", "--top_k=0"], ["top_k"]),
        (["--out_dir=out/run", "--num_sample=2"], ["did you mean num_samples?"]),
        (["--ckpt=best.bin"], ["out/", "python train.py"]),
    ],
)
def test_mistakes_end_in_one_line(run, refuses, arguments, words):
    refuses(sample.main, *arguments, words=words)


def test_a_folder_without_its_facts_is_refused(run, refuses):
    Path("out/run/run.json").unlink()
    refuses(sample.main, "--out_dir=out/run", words=["run.json"])
