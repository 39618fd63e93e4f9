"""How fast training, evaluation, decoding and the loader are, with W_Q and with W_Q = I, against the device's limits.

python bench.py config/baseline_tied.py                      a table of all four; turns A B A B …, medians, spread
python bench.py config/quick.py --only=train,decode --peer=hf      beside Hugging Face's GPT-2 of the same sizes
python bench.py config/baseline_tied.py --json=speed.json --profile    and where the time of a training step goes
python bench.py --plan --measured=speed.json                 memory and days of a run, by GPU

The configuration is that of train.py; wq_identity is set by the comparison. What says how long a run is, when it is
evaluated and what it logs has no effect. Nothing stays but what --json, --profile and --out_dir name.
"""

import dataclasses
import functools
import gc
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import configurator
import data
import train
from engine import decode, devices
from engine.attention import prefer_attention
from engine.files import sha256_of, write_json
from engine.flops import cost
from speed import hardware, peer, planning, profiling, speed_table, timing
from train_config import TrainConfig

PeerDtype = Literal["same", "float32", "bfloat16", "float16"]
PARTS = ("train", "eval", "decode", "loader")
Part, Peer = Literal[PARTS], Literal[tuple(peer.NAMES)]
PROFILED_MICRO_BATCHES = 3  # or those of one step, if it has more
# Fields that ask for what a benchmark does not do, and the value that does not.
REFUSED = dict(resume=False, eval_only=False, diagnostics=False, wandb_log=False, init_from="scratch", shard="none")


@dataclass
class BenchConfig(TrainConfig):
    """What to measure: the run of TrainConfig, and this."""

    out_dir: str | None = None  # where table.md goes, and traces with --profile; none: nowhere, traces to out/bench
    only: tuple[Part, ...] = PARTS  # what to measure: train, eval, decode, loader
    peer: tuple[Peer, ...] = ()  # hf: Hugging Face's GPT-2, too; nanogpt: nanoGPT's
    peer_dtype: PeerDtype = "same"  # of the matrix products of the peers; same: as ours
    nanogpt: str = "../nanoGPT"  # a clone of it, for --peer=nanogpt
    repeats: int = 5  # turns of each model; the table has medians and the middle half
    warmup: int = 2  # calls of each that are not timed, in which torch.compile works
    min_seconds: float = 1.0  # of a turn; steps are repeated to reach it
    micro_batches: int | None = None  # in a step; none: on CUDA those of tokens_per_step, on a CPU 1
    decode_prompt: int = 16  # tokens before those that are generated
    decode_tokens: int | None = None  # that are generated; none: 256, or as many as block_size allows
    decode_batch: int = 8  # sequences at once, beside 1
    decode_compile: bool = False  # torch.compile the decoding step, and on a GPU Hugging Face's
    uncached: bool = False  # decode without a cache, too
    profile: bool = False  # write a trace of a few training steps and print where the time goes
    json: str | None = None  # a file for everything that was measured
    plan: bool = False  # print memory, tokens/s and days by GPU, and measure nothing
    measured: str | None = None  # with --plan: the JSON file of a run of bench.py whose utilisation to take

    def __post_init__(self):
        super().__post_init__()
        for name in ("repeats", "decode_prompt", "decode_batch", "decode_tokens", "micro_batches"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup", "min_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        self.peer = tuple(dict.fromkeys(self.peer))
        for name in self.peer:
            peer.check(name, self)
        if self.peer_dtype != "same" and not self.peer:
            raise ValueError("peer_dtype is of the peers: add --peer=hf or --peer=nanogpt, or leave it out")
        if self.nanogpt != BenchConfig.nanogpt and "nanogpt" not in self.peer:
            raise ValueError("nanogpt is where that peer lies: add --peer=nanogpt, or leave it out")
        if self.measured and not self.plan:
            raise ValueError("measured is what --plan starts from: add --plan, or leave it out")
        for name, value in REFUSED.items():
            if getattr(self, name) != value and not (self.plan and name == "shard"):
                raise ValueError(f"bench.py does not measure with {name}={getattr(self, name)}: leave it out")
        if self.decode_tokens is None:
            self.decode_tokens = max(1, min(256, self.block_size - self.decode_prompt))
        if "decode" in self.only and self.causal and self.decode_prompt + self.decode_tokens > self.block_size:
            raise ValueError(
                f"decode_prompt={self.decode_prompt} and decode_tokens={self.decode_tokens} exceed "
                f"block_size={self.block_size}, beyond which no cache helps: make them smaller"
            )

    def train_config(self, **changes):
        """The TrainConfig among these fields, with changes."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)}
        return TrainConfig(**{**values, "out_dir": TrainConfig.out_dir, **changes})


class Model(timing.Arm):
    """One of the models that are compared: a train.Trainer whose parts are timed."""

    def __init__(self, name, cfg, make_peer=None):
        super().__init__(name, devices.choose_device(cfg.device))
        held = devices.allocated_bytes(self.device)
        self.run = train.Trainer(cfg)
        if make_peer:
            peer.replace_model(self.run, make_peer(), train.make_optimizer)
            gc.collect()  # our model, in whose place it came, is gone before memory is counted
        self.resident = devices.allocated_bytes(self.device) - held
        self.batches = self.run.batches()
        self.flops = cost(cfg.model_config())

    def step(self):
        """A training step, its batch from the loader; every log_interval steps the loss is waited for, as in a run."""
        if not self.run.unchecked:
            self.run.start_clock()
        self.run.within_memory(self.run.update, *next(self.batches))
        if self.run.step % self.run.cfg.log_interval == 0:
            self.run.check()

    def training(self):
        run = self.run
        return timing.Work(self, self.step, run.cfg.tokens_per_step, self.flops.training_flops, run.compute.dtype)

    def evaluation(self):
        offsets = data.evaluation_offsets(len(self.run.bins.val), self.run.cfg.block_size, self.run.n_sequences)
        tokens = len(offsets) * self.run.cfg.block_size
        flops, dtype = self.flops.forward_flops, self.run.compute.dtype
        return timing.Work(self, lambda: self.run.within_memory(self.run.evaluate, offsets), tokens, flops, dtype)

    def loading(self):
        return timing.Work(self, lambda: next(self.batches), self.run.cfg.tokens_per_step)

    def decoding_dtype(self, cfg, batch_size):
        """The torch.dtype in which it decodes batch_size sequences at once, as sample.py would choose it."""
        own = self.run.cfg
        return devices.resolve_decoding(own.device, own.dtype, own, batch_size, cfg.decode_compile).dtype

    def decoding(self, cfg, batch_size, cached=True):
        """Greedy decoding of cfg.decode_tokens after cfg.decode_prompt random ones, batch_size sequences at once."""
        model, n_new = self.run.model, cfg.decode_tokens
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(cfg.vocab_size, (batch_size, cfg.decode_prompt), generator=generator).to(self.device)
        dtype = self.decoding_dtype(cfg, batch_size)
        is_peer = isinstance(model, tuple(peer.MODELS.values()))
        cached = cached and not isinstance(model, peer.NanoGPT)

        @torch.no_grad()
        def call():
            model.eval()
            with devices.autocast(self.device, dtype):
                if is_peer:
                    tokens = model.generate(prompt, n_new, cfg.decode_compile)
                elif not cached:
                    tokens = uncached(model, prompt, n_new)
                else:
                    decode.lay_out(model, batch_size, dtype)
                    tokens = decode.generate(model, prompt, n_new, temperature=0, compile_step=cfg.decode_compile)
            model.train()
            assert tokens.shape == (batch_size, cfg.decode_prompt + n_new)

        # Operations of a new token with a mean number of others to look at; the prompt's are not counted.
        context = cfg.decode_prompt + n_new // 2
        flops = cost(dataclasses.replace(self.run.cfg.model_config(), block_size=context)).forward_flops
        return timing.Work(self, call, batch_size * n_new, flops if cached else None, dtype)


def uncached(model, idx, n_new):
    """The likeliest n_new tokens after idx, (B, T), with all before it computed again for each."""
    for _ in range(n_new):
        logits, _ = model(idx)
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return idx


def write_synthetic(folder, cfg):
    """Bins of random tokens, enough for the batches and the evaluation windows of a TrainConfig."""
    vocab_size = min(50257, cfg.vocab_size - (cfg.objective == "mlm"))
    dtype, rng, splits = data.dtype_for(vocab_size), np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    for name, tokens in (("train", max(2**22, 2 * cfg.tokens_per_step)), ("val", cfg.tokens_per_step + 1)):
        rng.integers(0, vocab_size, tokens).astype(data.DTYPES[dtype]).tofile(folder / f"{name}.bin")
        splits[name] = {"tokens": tokens, "documents": 1, "sha256": sha256_of(folder / f"{name}.bin")}
    data.write_manifest(folder, tokenizer="random", vocab_size=vocab_size, eot=0, dtype=dtype, splits=splits)


def timed_config(cfg, folder):
    """The TrainConfig that is timed, with its data in place: cfg's own, or random tokens in folder."""
    device = devices.choose_device(cfg.device)
    changes = dict(out_dir=str(folder / "run"), max_iters=10**9, save_steps=())
    micro_batches = cfg.micro_batches or (None if device.type == "cuda" else 1)
    if micro_batches:
        sequences = cfg.batch_size or max(1, devices.first_tokens(device) // cfg.block_size)
        changes["tokens_per_step"] = micro_batches * sequences * cfg.block_size
    timed = cfg.train_config(**changes)
    if any((Path(cfg.data_dir) / cfg.dataset / f"{split}.bin").is_file() for split in data.SPLITS):
        return timed
    timed = dataclasses.replace(timed, data_dir=str(folder), dataset="random")
    write_synthetic(folder / "random", timed)
    return timed


def make_models(cfg, timed):
    """name -> Model of what cfg compares: baseline, reduced, a mixture's ideal (training alone), and the peers."""
    changes = {"baseline": dict(wq_identity=False), "reduced": dict(wq_identity=True)}
    if cfg.n_expert and "train" in cfg.only:
        changes["active experts"] = dict(wq_identity=False, n_expert=0, mlp_ratio=cfg.mlp_ratio * cfg.n_expert_active)
    models = {name: Model(name, dataclasses.replace(timed, **fields)) for name, fields in changes.items()}
    fields = dict(wq_identity=False, dtype=timed.dtype if cfg.peer_dtype == "same" else cfg.peer_dtype)
    for each in cfg.peer:
        name, make = peer.NAMES[each], functools.partial(peer.MODELS[each], cfg)
        models[name] = Model(name, dataclasses.replace(timed, **fields), make)
    return models


def make_sections(cfg, models):
    """what is measured -> model's name -> Work, for the parts that cfg asks for."""
    everywhere = {name: model for name, model in models.items() if name != "active experts"}
    sections = {}
    if "train" in cfg.only:
        sections["training step"] = {name: model.training() for name, model in models.items()}
    if "eval" in cfg.only:
        sections["evaluation"] = {name: model.evaluation() for name, model in everywhere.items()}
    if "decode" in cfg.only and cfg.causal:
        for batch_size in sorted({1, cfg.decode_batch}):
            works = {name: model.decoding(cfg, batch_size) for name, model in everywhere.items()}
            if cfg.uncached:
                works["baseline, no cache"] = models["baseline"].decoding(cfg, batch_size, cached=False)
            sections[f"decoding, batch {batch_size}"] = works
    if "loader" in cfg.only:
        sections["loader alone"] = {"all": models["baseline"].loading()}
    return sections


def measure(cfg, timed):
    """All that cfg, a BenchConfig, asks for of `timed`, the TrainConfig: a dict, the content of the JSON file."""
    models = make_models(cfg, timed)
    run = models["baseline"].run
    if run.compute.compile or cfg.decode_compile:
        torch._dynamo.config.recompile_limit = 64  # the models share their code; beyond 8 versions it would run eagerly
    facts = hardware.facts(run.compute, run.cfg.model_config())
    sections, timings = make_sections(cfg, models), {}
    dtypes = sorted({work.dtype for works in sections.values() for work in works.values() if work.dtype}, key=str)
    products = {dtype: hardware.matrix_product_flops(run.device, dtype) for dtype in dtypes}
    for what, works in sections.items():
        print(f"{what} …", flush=True)
        timings[what] = timing.interleave(works, cfg.repeats, cfg.warmup, cfg.min_seconds)
    for dtype in dtypes:  # should something else have disturbed one of the two, the other is what the device can do
        products[dtype] = max(products[dtype], hardware.matrix_product_flops(run.device, dtype))
    reached = ", ".join(f"{products[dtype] / 1e12:,.2f} TFLOP/s in {devices.dtype_name(dtype)}" for dtype in dtypes)
    if reached:
        facts["large matrix product"] = f"{reached}, measured in this run"
    facts |= speed_table.conditions(cfg, timed, models)
    limits = {dtype: (hardware.peak_flops(facts["device"], dtype), products[dtype]) for dtype in dtypes}
    rows = [row for what in sections for row in speed_table.make_rows(what, sections[what], timings[what], limits)]
    result = {"header": facts, "config": dataclasses.asdict(timed), "rows": rows}
    result["notes"] = speed_table.notes(cfg, models, rows)
    if cfg.profile:
        for name in ("baseline", "reduced"):  # decoding may have left them in another order than their optimizers
            decode.lay_out(models[name].run.model)
        folder = Path(cfg.out_dir or "out/bench")
        folder.mkdir(parents=True, exist_ok=True)
        steps = max(1, PROFILED_MICRO_BATCHES * run.batch_size // run.n_own)
        result["profile"] = {
            name: profiling.profile(models[name].step, steps, run.device, folder / f"trace_{name}.json")
            for name in ("baseline", "reduced")
        }
        result["notes"].append(
            f"Time by kind of operation: training steps profiled: {steps}; traces for Perfetto or chrome://tracing: "
            f"{folder}/trace_*.json."
        )
    for model in models.values():
        model.batches.close()
    return result


def bench(cfg):
    """Measure or plan as cfg, a BenchConfig, says, print the table and write the files; what the JSON file has."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("bench.py measures one process: start it without torchrun")
    if cfg.json and not Path(cfg.json).parent.is_dir():
        raise ValueError(f"json: there is no folder {Path(cfg.json).parent}: make it first")
    if cfg.plan:
        measured = planning.read_measured(cfg.measured) if cfg.measured else None
        result = {"plan": planning.rows(cfg, measured)}
        text = planning.table(cfg, result["plan"])
    else:
        device = devices.choose_device(cfg.device)
        with tempfile.TemporaryDirectory() as folder, prefer_attention(device):
            result = measure(cfg, timed_config(cfg, Path(folder)))
        text = speed_table.table(result)
    print("\n" + text)
    if cfg.out_dir:
        folder = Path(cfg.out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    if cfg.json:
        write_json(cfg.json, result)
    return result


def main(argv):
    """The command; see the module's docstring."""
    bench(configurator.parse(BenchConfig, argv))


if __name__ == "__main__":
    configurator.run(main)
