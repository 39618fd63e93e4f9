"""Generate text from a trained run.

python sample.py                                            from the newest run in out/
python sample.py --out_dir=out/quick-reduced_tied --start="def " --num_samples=3 --temperature=0.8
python sample.py --start=FILE:prompt.txt --top_k=40 --top_p=0.95 --seed=7
python sample.py --ckpt=nanogpt/ckpt.pt --tokenizer=gpt2            from any checkpoint file, nanoGPT's included
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import configurator
from configurator import FilePath, require
from corpus import tokenizers
from engine import checkpoint, decode, devices, run_files
from engine.attention import prefer_attention
from engine.files import reason


@dataclass
class SampleConfig:
    """What to generate, and from which run."""

    out_dir: FilePath | None = None  # the run folder; none: the one in out/ whose checkpoint is newest
    ckpt: FilePath = run_files.CHECKPOINT  # the checkpoint in it, such as best.pt; without out_dir also any file's path
    tokenizer: str | None = None  # gpt2 or bytes; none: the one that run.json beside the checkpoint names
    start: str = "\n"  # the prompt, in which <|endoftext|> is the end-of-text token; FILE:path reads it from a file
    num_samples: int = 3  # continuations of the prompt
    max_new_tokens: int = 500  # tokens in each
    temperature: float = 0.8  # divides the logits; 0: always the likeliest token
    top_k: int | None = 200  # draw from the k likeliest tokens; none: from all
    top_p: float | None = None  # draw from the fewest tokens whose probability reaches p; none: from all
    seed: int = 1337  # of the draws
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: the fastest safe one
    compile: bool = False  # torch.compile: up to a minute to begin with, faster tokens after it

    def __post_init__(self):
        require(self, positive="num_samples max_new_tokens top_k", not_negative="temperature seed")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.out_dir is not None and not self.out_dir.strip():
            raise ValueError(f"out_dir must name a run folder, got {self.out_dir!r}")
        if not self.ckpt.strip():
            raise ValueError(f"ckpt must name a checkpoint file, got {self.ckpt!r}")


def checkpoint_path(cfg):
    """The checkpoint file that cfg names. Raises ValueError when it names none."""
    is_path = "/" in cfg.ckpt
    if cfg.out_dir is None:
        return Path(cfg.ckpt) if is_path or Path(cfg.ckpt).is_file() else newest_run(cfg.ckpt) / cfg.ckpt
    if is_path:
        raise ValueError(f"ckpt must be the name of a file in out_dir, got the path {cfg.ckpt}: leave out --out_dir")
    if Path(cfg.out_dir).is_file():
        raise ValueError(f"out_dir must be a run folder, got the file {cfg.out_dir}: use --ckpt={cfg.out_dir}")
    return Path(cfg.out_dir, cfg.ckpt)


def newest_run(ckpt):
    """The folder in out/ with the newest checkpoint called ckpt. Raises ValueError when there is none."""
    paths = [path for path in Path("out").glob("**/*.pt") if path.is_file()]
    if not paths:
        raise ValueError(
            "there is no run in out/ yet: train one with `python train.py …`, or name one with --out_dir=…"
        )
    found = [path for path in paths if path.name == ckpt]
    if not found:
        names = ", ".join(sorted({path.name for path in paths}))
        raise ValueError(f"no run in out/ has a checkpoint {ckpt}: the .pt files there are called {names}")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def prompt_text(start):
    """The prompt: start itself, or the content of the file in FILE:path.

    Raises ValueError for a file that cannot be read, is empty or is not text.
    """
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:")).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"start: cannot read the prompt from {path}: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"start: the prompt file {path} must be text in UTF-8, got other bytes") from error
    if "\0" in text:
        raise ValueError(f"start: the prompt file {path} must be text in UTF-8, got a binary file")
    if not text:
        raise ValueError(f"start: the prompt file {path} is empty; --start= alone begins a new document")
    return text


def sample(cfg):
    """Print the samples that cfg asks for; a list of their texts, each with its prompt."""
    from tqdm import tqdm

    path, text = checkpoint_path(cfg), prompt_text(cfg.start)
    state = checkpoint.load(path)
    if not state["model_config"]["causal"]:
        raise ValueError(f"{path} is an encoder (causal=False): it fills masks and cannot continue a text")
    tokenizer = tokenizers.tokenizer_of(path, cfg.tokenizer, state["model_config"]["vocab_size"])
    # An empty prompt begins where documents do, after the end of the one before.
    prompt = tokenizer.encode(text, allowed_special="all") or [tokenizer.eot_token]
    model = checkpoint.build_model(state).eval()
    compute = devices.resolve_decoding(cfg.device, cfg.dtype, model.config, cfg.num_samples, cfg.compile)
    model.to(compute.device)
    decode.lay_out(model, cfg.num_samples, compute.dtype)
    generator = torch.Generator(compute.device).manual_seed(cfg.seed)

    with (
        tqdm(total=cfg.num_samples * cfg.max_new_tokens, unit="token", disable=not sys.stderr.isatty()) as bar,
        compute.autocast,
        prefer_attention(compute.device),
    ):
        tokens = decode.generate(
            model,
            torch.tensor([prompt], device=compute.device),
            cfg.max_new_tokens,
            cfg.temperature,
            cfg.top_k,
            cfg.top_p,
            generator,
            cfg.num_samples,
            cfg.compile,
            bar.update,
        )
    print(f"{path}, step {state['step']}", file=sys.stderr)  # now that nothing can be refused any more
    texts = []
    for row in tokens.tolist():
        # Ids in the padded part of the vocabulary mean nothing; an untrained model may still draw them.
        texts.append(tokenizer.decode([token for token in row if token < tokenizer.n_vocab]))
        print(f"{texts[-1]}\n---------------")
    return texts


def main(argv):
    """The command; see the module's docstring."""
    sample(configurator.parse(SampleConfig, argv))


if __name__ == "__main__":
    configurator.run(main)
