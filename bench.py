"""How fast training, evaluation, decoding and the loader are, with W_Q and with W_Q = I, against the device's limits.

python bench.py config/baseline_tied.py                      a table of all four; turns A B A B …, medians, spread
python bench.py config/quick.py --only=train,decode --peer=hf      beside Hugging Face's GPT-2 of the same sizes
python bench.py config/baseline_tied.py --json=speed.json --profile    and where the time of a training step goes
python bench.py --plan --measured=speed.json                 memory and days of a run, by GPU

The configuration is that of train.py; wq_identity is set by the comparison. What says how long a run is, when it is
evaluated and what it logs has no effect. Nothing stays but what --json, --profile and --out_dir name.
"""

import dataclasses
import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import configurator
import data
import decode
import hardware
import parallel
import peer
import planning
import profiling
import timing
import train
from cost import cost
from train_config import TrainConfig

PeerDtype = Literal["same", "float32", "bfloat16", "float16"]
PARTS = ("train", "eval", "decode", "loader")
PROFILED_MICRO_BATCHES = 3  # or those of one step, if it has more
# Fields that ask for what a benchmark does not do, and the value that does not.
REFUSED = dict(resume=False, eval_only=False, diagnostics=False, wandb_log=False, init_from="scratch", shard="none")


@dataclass
class BenchConfig(TrainConfig):
    """What to measure: the run of TrainConfig, and this."""

    out_dir: str | None = None  # where table.md goes, and traces with --profile; none: nowhere, traces to out/bench
    only: tuple[str, ...] = PARTS  # what to measure: train, eval, decode, loader
    peer: Literal["none", "hf"] = "none"  # hf: Hugging Face's GPT-2, too
    peer_dtype: PeerDtype = "same"  # of the matrix products of the peer; same: as ours
    repeats: int = 5  # turns of each model; the table has medians and the middle half
    warmup: int = 2  # calls of each that are not timed, in which torch.compile works
    min_seconds: float = 1.0  # of a turn; steps are repeated to reach it
    micro_batches: int | None = None  # in a step; none: on CUDA those of tokens_per_step, on a CPU 1
    decode_prompt: int = 16  # tokens before those that are generated
    decode_tokens: int | None = None  # that are generated; none: 256, or as many as block_size allows
    decode_batch: int = 8  # sequences at once, beside 1
    decode_compile: bool = False  # torch.compile the decoding step, and the peer's
    uncached: bool = False  # decode without a cache, too
    profile: bool = False  # write a trace of a few training steps and print where the time goes
    json: str | None = None  # a file for everything that was measured
    plan: bool = False  # print memory, tokens/s and days by GPU, and measure nothing
    measured: str | None = None  # with --plan: the JSON file of a run of bench.py whose utilisation to take

    def __post_init__(self):
        super().__post_init__()
        for part in self.only:
            configurator.coerce("only", part, Literal[PARTS], "the command line")
        for name in ("repeats", "decode_prompt", "decode_batch", "decode_tokens", "micro_batches"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup", "min_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.peer == "hf":
            peer.check(self)
        if self.peer_dtype != "same" and self.peer == "none":
            raise ValueError("peer_dtype is of the peer: add --peer=hf, or leave it out")
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

    def __init__(self, name, cfg, hugging_face=False):
        super().__init__(name, parallel.choose_device(cfg.device))
        held = hardware.allocated_bytes(self.device)
        self.run = train.Trainer(cfg)
        if hugging_face:
            peer.put_into(self.run, train.make_optimizer)
            gc.collect()  # our model, in whose place it came, is gone before memory is counted
        self.resident = hardware.allocated_bytes(self.device) - held
        self.batches = self.run.batches()
        self.flops = cost(cfg.model_config())
        self.decoding_dtype = parallel.choose_dtype(cfg.dtype, self.device, cfg, decoding=True)

    def step(self):
        """A training step, its batch from the loader; every log_interval steps the loss is waited for, as in a run."""
        if not self.run.unchecked:
            self.run.start_clock()
        self.run.update(*next(self.batches))
        if self.run.step % self.run.cfg.log_interval == 0:
            self.run.check()

    def training(self):
        run = self.run
        return timing.Work(self, self.step, run.cfg.tokens_per_step, self.flops.training_flops, run.dtype)

    def evaluation(self):
        offsets = data.evaluation_offsets(len(self.run.bins.val), self.run.cfg.block_size, self.run.n_sequences)
        tokens = len(offsets) * self.run.cfg.block_size
        flops, dtype = self.flops.forward_flops, self.run.dtype
        return timing.Work(self, lambda: self.run.evaluate(offsets), tokens, flops, dtype)

    def loading(self):
        return timing.Work(self, lambda: next(self.batches), self.run.cfg.tokens_per_step)

    def decoding(self, cfg, batch_size, cached=True):
        """Greedy decoding of cfg.decode_tokens after cfg.decode_prompt random ones, batch_size sequences at once."""
        model, n_new = self.run.model, cfg.decode_tokens
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(cfg.vocab_size, (batch_size, cfg.decode_prompt), generator=generator).to(self.device)
        dtype = self.decoding_dtype

        @torch.no_grad()
        def call():
            model.eval()
            with parallel.autocast(self.device, dtype):
                if not cached:
                    tokens = uncached(model, prompt, n_new)
                elif isinstance(model, peer.HuggingFaceGPT2):
                    tokens = model.generate(prompt, n_new, cfg.decode_compile)
                else:
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
        splits[name] = {"tokens": tokens, "documents": 1, "sha256": data.sha256_of(folder / f"{name}.bin")}
    data.write_manifest(folder, tokenizer="random", vocab_size=vocab_size, eot=0, dtype=dtype, splits=splits)


def timed_config(cfg, folder):
    """The TrainConfig that is timed, with its data in place: cfg's own, or random tokens in folder."""
    device = parallel.choose_device(cfg.device)
    changes = dict(out_dir=str(folder / "run"), max_iters=10**9, save_steps=())
    micro_batches = cfg.micro_batches or (None if device.type == "cuda" else 1)
    if micro_batches:
        sequences = cfg.batch_size or max(1, train.first_tokens(device) // cfg.block_size)
        changes["tokens_per_step"] = micro_batches * sequences * cfg.block_size
    timed = cfg.train_config(**changes)
    if any((Path(cfg.data_dir) / cfg.dataset / f"{split}.bin").is_file() for split in data.SPLITS):
        return timed
    timed = dataclasses.replace(timed, data_dir=str(folder), dataset="random")
    write_synthetic(folder / "random", timed)
    return timed


def make_models(cfg, timed):
    """name -> Model of what cfg compares: baseline, reduced, the peer, and for a mixture its ideal (training alone)."""
    changes = {"baseline": dict(wq_identity=False), "reduced": dict(wq_identity=True)}
    if cfg.peer == "hf":
        changes["Hugging Face"] = dict(
            wq_identity=False, dtype=timed.dtype if cfg.peer_dtype == "same" else cfg.peer_dtype
        )
    if cfg.n_expert and "train" in cfg.only:
        changes["active experts"] = dict(wq_identity=False, n_expert=0, mlp_ratio=cfg.mlp_ratio * cfg.n_expert_active)
    return {
        name: Model(name, dataclasses.replace(timed, **fields), hugging_face=name == "Hugging Face")
        for name, fields in changes.items()
    }


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
    if run.compiled or cfg.decode_compile:
        torch._dynamo.config.recompile_limit = 64  # the models share their code; beyond 8 versions it would run eagerly
    facts = hardware.facts(run.device, run.dtype, run.cfg.model_config(), run.compiled)
    sections, timings = make_sections(cfg, models), {}
    dtypes = sorted({work.dtype for works in sections.values() for work in works.values() if work.dtype}, key=str)
    products = {dtype: hardware.matrix_product_flops(run.device, dtype) for dtype in dtypes}
    for what, works in sections.items():
        print(f"{what} …", flush=True)
        timings[what] = timing.interleave(works, cfg.repeats, cfg.warmup, cfg.min_seconds)
    for dtype in dtypes:  # should something else have disturbed one of the two, the other is what the device can do
        products[dtype] = max(products[dtype], hardware.matrix_product_flops(run.device, dtype))
    reached = ", ".join(f"{products[dtype] / 1e12:,.2f} TFLOP/s in {parallel.dtype_name(dtype)}" for dtype in dtypes)
    if reached:
        facts["large matrix product"] = f"{reached}, measured in this run"
    facts |= conditions(cfg, timed, models)
    limits = {dtype: (hardware.peak_flops(facts["device"], dtype), products[dtype]) for dtype in dtypes}
    rows = [row for what in sections for row in make_rows(what, sections[what], timings[what], limits)]
    result = {"header": facts, "config": dataclasses.asdict(timed), "rows": rows}
    result["notes"] = notes(cfg, models, rows)
    if cfg.profile:
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


def conditions(cfg, timed, models):
    """What the table must say of what was done: name -> text."""
    # With batch_size=0 models may have ended with different micro-batches.
    batch_sizes = {model.run.batch_size for model in models.values()}
    micro_batches = " or ".join(f"{models['baseline'].run.n_own // size} × {size}" for size in sorted(batch_sizes))
    said = {
        "model": f"{cfg.n_layer} layers, {cfg.n_head} heads, n_embd {cfg.n_embd}, vocabulary {cfg.vocab_size:,}",
        "step": f"{timed.tokens_per_step:,} tokens, {micro_batches} sequences of {cfg.block_size:,} (in a run "
        f"{cfg.tokens_per_step:,} tokens)",
        "data": f"{timed.data_dir}/{timed.dataset}" if timed.dataset == cfg.dataset else "random (no dataset is here)",
        "turns": f"{cfg.repeats} of each, in turn: median [middle half]; ratios are of turns in the same round",
    }
    if "decode" in cfg.only and cfg.causal:
        dtype = parallel.dtype_name(models["baseline"].decoding_dtype)
        said["decoding"] = (
            f"{cfg.decode_tokens} tokens after a prompt of {cfg.decode_prompt}, greedy, the prompt's time included, "
            f"in {dtype}, {'compiled' if cfg.decode_compile else 'not compiled'}"
        )
    return said


def make_rows(what, works, timings, limits):
    """A dict for each line of the table, from what `timing.interleave` gives.

    limits: dtype -> operations a second of the datasheet (None: not known) and of a large matrix product.
    """
    rows = []
    for name, work in works.items():
        timed = timings[name]
        rate, *half = timing.middle(timed.rates)
        row = dict(what=what, model=name, tokens_per_second=rate, middle_half=half, rates=timed.rates)
        row |= dict(calls=timed.calls, tokens=work.tokens, flops=work.flops, peak_bytes=timed.peak_bytes)
        of_peak, of_product = (
            timing.utilisation(rate, work.flops, limit) for limit in limits.get(work.dtype, (None, None))
        )
        row |= dict(of_peak=of_peak, of_product=of_product)
        for reference in ("baseline", "Hugging Face"):
            if reference in works and reference != name:
                row[f"over {reference}"] = timing.middle(timing.ratios(timed, timings[reference]))
        rows.append(row)
    return rows


def notes(cfg, models, rows):
    """What the table's lines mean for decoding and for a mixture of experts: a list of sentences."""
    by_name = {(row["what"], row["model"]): row for row in rows}
    found = []
    reduced = by_name.get(("decoding, batch 1", "reduced"))
    if reduced:
        sizes = []
        for wq_identity in (False, True):
            config = cfg.train_config(wq_identity=wq_identity).model_config()
            layers = config.n_layer if config.share_layers else 1
            sizes.append(cost(config).attn_mlp * layers * models["baseline"].decoding_dtype.itemsize)
        ratio, lower, upper = reduced["over baseline"]
        found.append(
            f"Decoding: a token at batch 1 reads {sizes[0] / 1e6:,.2f} MB of block weights with W_Q and "
            f"{sizes[1] / 1e6:,.2f} MB with W_Q = I, {1 - sizes[1] / sizes[0]:.1%} fewer. Were that all its time, it "
            f"would be {sizes[0] / sizes[1]:.3f} times as fast; measured: {ratio:.3f} [{lower:.3f}, {upper:.3f}]."
        )
    ideal = by_name.get(("training step", "active experts"))
    if ideal:
        ratio, lower, upper = ideal["over baseline"]
        operations = by_name["training step", "baseline"]["flops"] / ideal["flops"]
        found.append(
            f"Mixture: all {cfg.n_expert} experts are computed. A training step takes {ratio:.2f} [{lower:.2f}, "
            f"{upper:.2f}] times that of an ideal MLP of the {cfg.n_expert_active} active ones alone (mlp_ratio "
            f"{cfg.mlp_ratio * cfg.n_expert_active:g}, {operations:.2f} times fewer operations)."
        )
    if cfg.peer == "hf":
        dtype = parallel.dtype_name(models["Hugging Face"].run.dtype)
        found.append(
            f"Hugging Face: GPT2LMHeadModel with SDPA, in the same loop, with the same optimizer, in {dtype}; it "
            "has biases, and its own loss in training and its own generate, greedy, in decoding."
        )
    if "decode" in cfg.only and not cfg.causal:
        found.append("Decoding: n/a, as an encoder (causal=False) generates nothing.")
    if any(row["peak_bytes"] is None for row in rows):
        found.append(f"Memory of a model alone is counted on a GPU. {process_memory()}")
    return found


def process_memory():
    """A sentence with the memory of this process."""
    used = parallel.peak_memory_bytes(torch.device("cpu"))
    return f"This process held up to {used / 1e9:.2f} GB with all models."


def table(result):
    """The content of the JSON file as Markdown."""
    lines = [f"- {name}: {value}" for name, value in result["header"].items()]
    rows = result["rows"]
    references = [name for name in ("baseline", "Hugging Face") if any(f"over {name}" in row for row in rows)]
    columns = ["tokens/s", *(f"times {name}" for name in references)]
    columns += ["of the datasheet's peak", "of a large product", "peak memory"]
    lines += ["", "| what | model | " + " | ".join(columns) + " |", "| --- | --- |" + " ---: |" * len(columns)]
    for row in rows:
        lower, upper = row["middle_half"]
        digits = 0 if upper >= 1000 else 1
        speeds = [f"{rate:,.{digits}f}" for rate in (row["tokens_per_second"], lower, upper)]
        cells = [row["what"], row["model"], f"{speeds[0]} [{speeds[1]}, {speeds[2]}]"]
        for reference in references:
            median, lower, upper = row.get(f"over {reference}", (None,) * 3)
            cells.append("" if median is None else f"{median:.3f} [{lower:.3f}, {upper:.3f}]")
        cells += ["n/a" if row[name] is None else f"{row[name]:.1%}" for name in ("of_peak", "of_product")]
        cells.append("n/a" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB")
        lines.append("| " + " | ".join(cells) + " |")
    if "profile" in result:
        names = list(result["profile"])
        lines += ["", "| time of training steps | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
        for kind in result["profile"][names[0]]:
            cells = [f"{result['profile'][name][kind]:.1%}" for name in names]
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    for note in result["notes"]:
        lines += ["", note]
    return "\n".join(lines)


def bench(cfg):
    """Measure or plan as cfg, a BenchConfig, says, print the table and write the files; what the JSON file has."""
    if parallel.world().size > 1:
        raise ValueError("bench.py measures one process: start it without torchrun")
    if cfg.json and not Path(cfg.json).parent.is_dir():
        raise ValueError(f"json: there is no folder {Path(cfg.json).parent}: make it first")
    if cfg.plan:
        measured = planning.read_measured(cfg.measured) if cfg.measured else None
        result = {"plan": planning.rows(cfg, measured)}
        text = planning.table(cfg, result["plan"])
    else:
        device = parallel.choose_device(cfg.device)
        with tempfile.TemporaryDirectory() as folder, parallel.prefer_attention(device):
            result = measure(cfg, timed_config(cfg, Path(folder)))
        text = table(result)
    print("\n" + text)
    if cfg.out_dir:
        folder = Path(cfg.out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    if cfg.json:
        data.write_json(cfg.json, result)
    return result


def main(argv):
    """The command; see the module's docstring."""
    bench(configurator.parse(BenchConfig, argv))


if __name__ == "__main__":
    configurator.run(main)
