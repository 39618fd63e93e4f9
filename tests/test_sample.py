import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_data import write_characters

import sample
import train
from engine import checkpoint, decode


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


def test_a_prompt_from_a_file_and_an_empty_one(run, tmp_path, monkeypatch):
    Path("prompt.txt").write_text("import ünicode")
    assert sample.sample(options(start="FILE:prompt.txt"))[0].startswith("import ünicode")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sample.sample(options(start="FILE:~/prompt.txt"))[0].startswith("import ünicode")
    assert sample.sample(options(start=""))


@pytest.mark.parametrize(
    ("start", "tokens"),
    [
        ("", [256]),
        ("<|endoftext|>", [256]),
        ("a<|endoftext|>b<|endoftext|>", [97, 256, 98, 256]),
        ("FILE:prompt.txt", [256, 10]),
    ],
)
def test_the_end_of_text_token_may_stand_anywhere_in_a_prompt(run, monkeypatch, start, tokens):
    Path("prompt.txt").write_text("<|endoftext|>\n")
    prompts = []
    generate = decode.generate

    def record(model, prompt, *arguments):
        prompts.append(prompt.tolist())
        return generate(model, prompt, *arguments)

    monkeypatch.setattr(decode, "generate", record)
    sample.sample(options(start=start))
    assert prompts == [[tokens]]


def test_without_a_folder_the_newest_run_is_sampled(run, tiny, command):
    train.train(tiny(vocab_size=320, max_iters=1, out_dir="out/newer/run"))
    status, out, error = command(sample.main, "--max_new_tokens=3", "--num_samples=1")
    assert status == 0
    assert "out/newer/run/ckpt.pt, step 1" in error
    assert out.endswith("---------------\n")


def test_any_checkpoint_file_is_sampled(run, command, tmp_path):
    arguments = ["--max_new_tokens=9", "--num_samples=1", "--start=a", "--dtype=float32"]
    expected = command(sample.main, "--out_dir=out/run", *arguments)[1].splitlines()[-2:]
    Path("elsewhere").mkdir()
    for path in ("elsewhere/weights.pt", "weights.pt", tmp_path / "absolute.pt"):
        shutil.copy("out/run/ckpt.pt", path)
        status, out, error = command(sample.main, f"--ckpt={path}", "--tokenizer=bytes", *arguments)
        assert (status, out.splitlines()) == (0, expected), error
        assert f"{path}, step 3" in error
    status, out, error = command(sample.main, "--ckpt=out/run/best.pt", *arguments)  # run.json is beside it
    assert status == 0, error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out_dir=nowhere"], ["nowhere/ckpt.pt", "there is no folder nowhere"]),
        (["--out_dir=out/run", "--ckpt=step_9.pt"], ["out/run/step_9.pt", "are best.pt, ckpt.pt"]),
        (["--out_dir=out/run/ckpt.pt"], ["out_dir must be a run folder", "--ckpt=out/run/ckpt.pt"]),
        (["--out_dir=out/run", "--ckpt=out/run/ckpt.pt"], ["ckpt must be the name of a file", "leave out --out_dir"]),
        (["--out_dir="], ["out_dir must name a run folder"]),
        (["--ckpt="], ["ckpt must name a checkpoint file"]),
        (["--ckpt=out/run"], ["out/run is a folder", "are best.pt, ckpt.pt"]),
        (["--ckpt=out/none.pt"], ["there is no checkpoint out/none.pt", "out has no .pt files"]),
        (["--ckpt=best.bin"], ["no run in out/ has a checkpoint best.bin", "best.pt, ckpt.pt"]),
        (["--ckpt=prompt.bin"], ["prompt.bin is damaged at its beginning"]),
        (["--ckpt=copy.pt"], ["run.json names the tokenizer", "--tokenizer=gpt2"]),
        (["--ckpt=copy.pt", "--tokenizer=words"], ["must be", "got 'words'"]),
        (["--out_dir=out/run", "--tokenizer=gpt2"], ["tokenizer must be bytes, as out/run/run.json says, got gpt2"]),
        (["--out_dir=out/run", "--start=FILE:nothing.txt"], ["nothing.txt: No such file"]),
        (["--out_dir=out/run", "--start=FILE:out"], ["prompt from out: Is a directory"]),
        (["--out_dir=out/run", "--start=FILE:prompt.bin"], ["prompt.bin must be text in UTF-8"]),
        (["--out_dir=out/run", "--start=FILE:zeros.txt"], ["zeros.txt must be text in UTF-8"]),
        (["--out_dir=out/run", "--start=FILE:empty.txt"], ["empty.txt is empty"]),
        (["--out_dir=out/run", "--temperature=-1"], ["temperature"]),
        (["--out_dir=out/run", "--top_p=1.5"], ["top_p"]),
        (["--out_dir=out/run", "--top_k=0"], ["top_k"]),
        (["--out_dir=out/run", "--num_sample=2"], ["did you mean num_samples?"]),
    ],
)
def test_mistakes_end_in_one_line(run, refuses, arguments, words):
    Path("prompt.bin").write_bytes(b"\xff\xfe\0a")
    Path("zeros.txt").write_bytes(bytes(9))
    Path("empty.txt").touch()
    shutil.copy("out/run/ckpt.pt", "copy.pt")
    refuses(sample.main, *arguments, words=words)


def test_without_any_run_the_command_that_makes_one_is_named(tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    refuses(sample.main, words=["there is no run in out/", "python train.py"])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny, refuses):
    train.train(tiny(max_iters=1, out_dir="out/run"))
    refuses(sample.main, "--out_dir=out/run", words=["at most 64 tokens", "out/run/ckpt.pt", "got bytes with 257"])


def test_a_folder_without_its_facts_is_refused(run, refuses, command):
    Path("out/run/run.json").unlink()
    refuses(sample.main, "--out_dir=out/run", words=["run.json", "--tokenizer=bytes"])
    assert command(sample.main, "--out_dir=out/run", "--tokenizer=bytes", "--max_new_tokens=2")[0] == 0
    Path("out/run/run.json").write_text('{"data": "bytes"}')
    refuses(sample.main, "--out_dir=out/run", words=["run.json", "--tokenizer=bytes"])


def test_a_run_on_nanogpt_s_characters_is_sampled(tiny, command, refuses):
    characters = write_characters(Path("data/chars"), "to be, or not to be: é\n" * 100)
    size = [f"--{name}={value}" for name, value in {**TINY, "max_iters": 2, "warmup_iters": 0}.items() if value != ()]
    assert command(train.main, *size, "--dataset=chars", "--out_dir=out/chars")[0] == 0
    argv = ["--out_dir=out/chars", "--num_samples=1", "--max_new_tokens=9"]
    for start in ("to be: é", "", "\n"):
        status, out, _ = command(sample.main, *argv, f"--start={start}")
        assert status == 0
        text = out.removesuffix("\n---------------\n")
        assert text.startswith(start) and set(text) <= {*characters}
        assert len(text) <= max(1, len(start)) + 9
    refuses(sample.main, *argv, "--start=tö be", words=[f"the {len(characters)} characters", "got 'ö'"])
