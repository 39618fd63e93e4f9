"""Generate text from a trained run.

python sample.py                                            from the newest run in out/
python sample.py --out_dir=out/quick-reduced_tied --start="def " --num_samples=3 --temperature=0.8
python sample.py --start=FILE:prompt.txt --top_k=40 --top_p=0.95 --seed=7
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
from engine.files import read_json


@dataclass
class SampleConfig:
    """What to generate, and from which run."""

    out_dir: FilePath | None = None  # the run folder; none: the one in out/ whose checkpoint is newest
    ckpt: str = run_files.CHECKPOINT  # the checkpoint in it: ckpt.pt, best.pt or one of save_steps
    start: str = "\n"  # the prompt; FILE:path reads it from a file
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


def newest_run(ckpt):
    """The folder in out/ with the newest checkpoint called ckpt. Raises ValueError when there is none."""
    paths = sorted(Path("out").glob(f"**/{ckpt}"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise ValueError(
            "there is no run in out/ yet: train one with `python train.py …`, or name one with --out_dir=…"
        )
    return paths[-1].parent


def prompt_text(start):
    """The prompt: start itself, or the content of the file in FILE:path. Raises ValueError for an unreadable file."""
    if not start.startswith("FILE:"):
        return start
    path = start.removeprefix("FILE:")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"start: cannot read the prompt from {path}: {error}") from error


def sample(cfg):
    """Print the samples that cfg asks for; a list of their texts, each with its prompt."""
    from tqdm import tqdm

    folder = Path(cfg.out_dir) if cfg.out_dir else newest_run(cfg.ckpt)
    state = checkpoint.load(folder / cfg.ckpt)
    run = read_json(folder / run_files.FACTS)
    if run is None:
        raise ValueError(f"{folder} has no run.json, which names the tokenizer: is it a run folder?")
    if not state["model_config"].get("causal", True):
        raise ValueError(f"{folder / cfg.ckpt} is an encoder (causal=False): it fills masks and cannot continue a text")
    tokenizer = tokenizers.get_tokenizer(run["data"]["tokenizer"])
    # An empty prompt begins where documents do, after the end of the one before.
    prompt = tokenizer.encode_ordinary(prompt_text(cfg.start)) or [tokenizer.eot_token]
    model = checkpoint.build_model(state).eval()
    compute = devices.resolve_decoding(cfg.device, cfg.dtype, model.config, cfg.num_samples, cfg.compile)
    model.to(compute.device)
    decode.lay_out(model, cfg.num_samples, compute.dtype)
    generator = torch.Generator(compute.device).manual_seed(cfg.seed)
    print(f"{folder / cfg.ckpt}, step {state['step']}", file=sys.stderr)

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
