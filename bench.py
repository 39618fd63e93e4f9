"""Measure the speed of training, evaluation, decoding and the data loader, with W_Q and with W_Q = I; or plan a run.

python bench.py config/baseline_tied.py                             all four parts, the models taking turns
python bench.py config/quick.py --only=train,decode --peer=hf       beside Hugging Face's GPT-2 of the same sizes
python bench.py config/baseline_tied.py --json=speed.json --profile     and how the time of a training step divides
python bench.py --plan --measured=speed.json                        memory and days of a run on each GPU

The model and its training are those that train.py would take from the same options, except that both values of
wq_identity are measured. The options for the length of a run, its evaluations and its logging have no effect. Files are
written to --json and --out_dir (with --profile to out/bench unless --out_dir is given). speed/README.md says what the
rows mean.
"""

import dataclasses
import functools
import gc
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import configurator
import data
import train
from configurator import FilePath
from engine import decode, devices
from engine.attention import prefer_attention
from engine.files import make_folder, write_json, write_text
from engine.flops import cost
from speed import hardware, peer, planning, profiling, speed_table, timing
from train_config import TrainConfig

PeerDtype = Literal["same", "float32", "bfloat16", "float16"]
PARTS = ("train", "eval", "decode", "loader")
Part, Peer = Literal[PARTS], Literal[tuple(peer.NAMES)]
PROFILED_MICRO_BATCHES = 3  # or those of one step, if it has more
# Options of train.py that a benchmark cannot have, and the value that they must keep.
REFUSED = dict(resume=False, eval_only=False, diagnostics=False, wandb_log=False, init_from="scratch", shard="none")
REFUSED |= dict(branch_from=None, max_seconds=None)
# Options that --plan would ignore.
MEASURING = "only peer peer_dtype nanogpt profile repeats warmup min_seconds micro_batches".split()
MEASURING += "decode_prompt decode_tokens decode_batch decode_compile uncached".split()


@dataclass
class BenchConfig(TrainConfig):
    """What to measure: a run's TrainConfig, and these."""

    # what is measured
    only: tuple[Part, ...] = PARTS  # any of train, eval, decode, loader
    peer: tuple[Peer, ...] = ()  # other implementations beside ours: hf (Hugging Face's GPT-2), nanogpt
    peer_dtype: PeerDtype = "same"  # of the peers' matrix products; same: as ours
    nanogpt: FilePath = "../nanoGPT"  # a clone of nanoGPT, for --peer=nanogpt
    profile: bool = False  # trace a few training steps and print how their time divides into kinds of operation

    # turns
    repeats: int = 5  # turns of each model; the table has their median and interquartile range
    warmup: int = 2  # untimed calls of each before that; torch.compile compiles in them
    min_seconds: float = 1.0  # of a turn of the fastest model, at least; the others make as many calls
    micro_batches: int | None = None  # in a training step; none: as in a run on CUDA (tokens_per_step), 1 on a CPU

    # decoding
    decode_prompt: int = 16  # tokens of the prompt
    decode_tokens: int | None = None  # tokens generated after it; none: 256, or as many as fit into block_size
    decode_batch: int = 8  # sequences at once; measured besides a single one
    decode_compile: bool = False  # torch.compile the decoding step; Hugging Face's too, but on a GPU only
    uncached: bool = False  # also measure the baseline decoding without a KV cache

    # files
    out_dir: FilePath | None = None  # the folder for table.md, and for the traces of --profile
    json: FilePath | None = None  # the JSON file for all measurements, or for the plan

    # planning
    plan: bool = False  # measure nothing; print memory, tokens/s and days of the run on each GPU
    measured: FilePath | None = None  # with --plan: the JSON file of a measurement, to take its utilisation

    def __post_init__(self):
        super().__post_init__()
        configurator.require(
            self,
            positive="repeats micro_batches decode_prompt decode_tokens decode_batch",
            not_negative="warmup min_seconds",
        )
        for name, value in REFUSED.items():
            if getattr(self, name) != value and not (self.plan and name == "shard"):
                raise ValueError(f"bench.py needs {name}={value}, got {getattr(self, name)}: leave --{name} out")
        if self.plan:
            for name in MEASURING:
                if getattr(self, name) != getattr(BenchConfig, name):
                    raise ValueError(f"--plan measures nothing, got {name}={getattr(self, name)}: leave --{name} out")
            return
        if self.measured:
            raise ValueError("--measured needs --plan: add --plan, or leave --measured out")
        self.peer = tuple(dict.fromkeys(self.peer))
        for name in self.peer:
            peer.check(name, self)
        if self.peer_dtype != "same" and not self.peer:
            raise ValueError("--peer_dtype needs a peer: add --peer=hf or --peer=nanogpt, or leave --peer_dtype out")
        if self.nanogpt != BenchConfig.nanogpt and "nanogpt" not in self.peer:
            raise ValueError("--nanogpt needs --peer=nanogpt: add it, or leave --nanogpt out")
        for name in ("uncached", "decode_compile"):
            if getattr(self, name) and "decode" not in self.only:
                raise ValueError(
                    f"--{name} needs decode in --only, got {', '.join(self.only)}: add it, or leave --{name} out"
                )
        if self.decode_tokens is None:
            self.decode_tokens = max(1, min(256, self.block_size - self.decode_prompt))
        if "decode" in self.only and self.causal and self.decode_prompt + self.decode_tokens > self.block_size:
            raise ValueError(
                f"decode_prompt + decode_tokens must be at most block_size={self.block_size}, got "
                f"{self.decode_prompt} + {self.decode_tokens}: set a smaller --decode_prompt or --decode_tokens"
            )

    def train_config(self, **changes):
        """The TrainConfig among these fields, with changes; out_dir, there the run folder, has its default."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)}
        return TrainConfig(**{**values, "out_dir": TrainConfig.out_dir, **changes})


class BenchModel(timing.TimedModel):
    """One of the compared models: a train.Trainer, and what of it is timed.

    cfg: a TrainConfig. make_peer: returns the model that replaces ours in the Trainer; None: ours stays.
    """

    def __init__(self, name, cfg, make_peer=None):
        super().__init__(name, devices.choose_device(cfg.device))
        allocated = devices.allocated_bytes(self.device)
        self.trainer = train.Trainer(cfg)
        if make_peer:
            peer.replace_model(self.trainer, make_peer(), train.make_optimizer)
            gc.collect()  # free our own model, which it replaced, before memory is counted
        self.resident = devices.allocated_bytes(self.device) - allocated
        self.batches = self.trainer.batches()
        self.cost = cost(cfg.model_config())

    def step(self):
        """A training step on the loader's next batch; as in a run, the loss is read every log_interval steps."""
        trainer = self.trainer
        if not trainer.unchecked:
            trainer.start_clock()
        trainer.within_memory(trainer.update, *next(self.batches))
        if trainer.step % trainer.cfg.log_interval == 0:
            trainer.check()

    def training(self):
        """The Workload of a training step, batches included."""
        tokens, dtype = self.trainer.cfg.tokens_per_step, self.trainer.compute.dtype
        return timing.Workload(self, self.step, tokens, self.cost.training_flops, dtype)

    def evaluation(self):
        """The Workload of evaluating as many sequences as a training step has."""
        trainer = self.trainer
        block_size = trainer.cfg.block_size
        offsets = data.evaluation_offsets(len(trainer.bins.val), block_size, trainer.n_sequences)

        def call():
            trainer.within_memory(trainer.evaluate, offsets)

        tokens = len(offsets) * block_size
        return timing.Workload(self, call, tokens, self.cost.forward_flops, trainer.compute.dtype)

    def loading(self):
        """The Workload of making the batch of a training step and moving it to the device."""
        return timing.Workload(self, lambda: next(self.batches), self.trainer.cfg.tokens_per_step)

    def decoding_dtype(self, cfg, batch_size):
        """The torch.dtype in which it decodes batch_size sequences at once, the one that sample.py would choose."""
        own = self.trainer.cfg
        return devices.resolve_decoding(own.device, own.dtype, own, batch_size, cfg.decode_compile).dtype

    def decoding(self, cfg, batch_size, cached=True):
        """The Workload of greedily decoding cfg.decode_tokens tokens after cfg.decode_prompt random ones.

        cfg: a BenchConfig. batch_size: sequences at once. cached: with a KV cache, where the model has one.
        """
        model, n_new = self.trainer.model, cfg.decode_tokens
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
                    tokens = generate_uncached(model, prompt, n_new)
                else:
                    decode.lay_out(model, batch_size, dtype)
                    tokens = decode.generate(model, prompt, n_new, temperature=0, compile_step=cfg.decode_compile)
            model.train()
            assert tokens.shape == (batch_size, cfg.decode_prompt + n_new)

        # FLOPs of a new token, attending to as many positions as the average one does; the prompt's are not counted.
        context = cfg.decode_prompt + n_new // 2
        flops = cost(dataclasses.replace(self.trainer.cfg.model_config(), block_size=context)).forward_flops
        return timing.Workload(self, call, batch_size * n_new, flops if cached else None, dtype)


def generate_uncached(model, idx, n_new):
    """idx, (B, T) int64, greedily continued by n_new tokens without a KV cache: (B, T + n_new)."""
    for _ in range(n_new):
        logits, _ = model(idx)
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return idx


def timed_config(cfg, folder):
    """The TrainConfig of the measured models, on cfg's data, or where that is missing on random tokens in folder."""
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
    vocab_size = min(50257, timed.vocab_size - (timed.objective == "mlm"))
    n_train = max(2**22, 2 * timed.tokens_per_step)  # enough for the batches and evaluations
    data.write_random_bins(folder / "random", n_train, timed.tokens_per_step + 1, vocab_size)
    return timed


def make_models(cfg, timed):
    """name -> BenchModel: baseline, reduced, for a mixture of experts an MLP of the active ones, and cfg's peers."""
    changes = {"baseline": dict(wq_identity=False), "reduced": dict(wq_identity=True)}
    if cfg.n_expert and "train" in cfg.only:
        changes["active experts"] = dict(wq_identity=False, n_expert=0, mlp_ratio=cfg.mlp_ratio * cfg.n_expert_active)
    models = {name: BenchModel(name, dataclasses.replace(timed, **fields)) for name, fields in changes.items()}
    fields = dict(wq_identity=False, dtype=timed.dtype if cfg.peer_dtype == "same" else cfg.peer_dtype)
    for key in cfg.peer:
        name, make_peer = peer.NAMES[key], functools.partial(peer.MODELS[key], cfg)
        models[name] = BenchModel(name, dataclasses.replace(timed, **fields), make_peer)
    return models


def make_workloads(cfg, models):
    """what is measured -> model's name -> Workload, for the parts that cfg asks for."""
    complete = {name: model for name, model in models.items() if name != "active experts"}  # that one only trains
    workloads = {}
    if "train" in cfg.only:
        workloads["training step"] = {name: model.training() for name, model in models.items()}
    if "eval" in cfg.only:
        workloads["evaluation"] = {name: model.evaluation() for name, model in complete.items()}
    if "decode" in cfg.only and cfg.causal:
        for batch_size in sorted({1, cfg.decode_batch}):
            decoding = {name: model.decoding(cfg, batch_size) for name, model in complete.items()}
            if cfg.uncached:
                decoding["baseline, no cache"] = models["baseline"].decoding(cfg, batch_size, cached=False)
            workloads[f"decoding, batch {batch_size}"] = decoding
    if "loader" in cfg.only:
        workloads["loader alone"] = {"all": models["baseline"].loading()}
    return workloads


def measure(cfg, timed):
    """The measurements that a BenchConfig asks for, with models of the TrainConfig `timed`: the JSON file's content."""
    models = make_models(cfg, timed)
    trainer = models["baseline"].trainer
    if trainer.compute.compile or cfg.decode_compile:
        # All models share the code that is compiled; beyond the default of 8 versions of it they would run eagerly.
        torch._dynamo.config.recompile_limit = 64
    header = hardware.environment(trainer.compute, trainer.cfg.model_config())
    workloads, timings = make_workloads(cfg, models), {}
    dtypes = {workload.dtype for named in workloads.values() for workload in named.values() if workload.dtype}
    dtypes = sorted(dtypes, key=str)
    products = {dtype: hardware.matrix_product_flops(trainer.device, dtype) for dtype in dtypes}
    for what, named in workloads.items():
        print(f"{what} …", flush=True)
        timings[what] = timing.interleave(named, cfg.repeats, cfg.warmup, cfg.min_seconds)
    for dtype in dtypes:  # of the measurements before and after, the larger is less disturbed by other processes
        products[dtype] = max(products[dtype], hardware.matrix_product_flops(trainer.device, dtype))
    reached = ", ".join(f"{products[dtype] / 1e12:,.2f} TFLOP/s in {devices.dtype_name(dtype)}" for dtype in dtypes)
    if reached:
        header["large matrix product"] = f"{reached}, measured in this run"
    header |= speed_table.conditions(cfg, timed, models)
    limits = {dtype: (hardware.peak_flops(header["device"], dtype), products[dtype]) for dtype in dtypes}
    rows = []
    for what, named in workloads.items():
        rows += speed_table.make_rows(what, named, timings[what], limits)
    result = {"header": header, "config": dataclasses.asdict(timed), "rows": rows}
    result["notes"] = speed_table.notes(cfg, models, rows)
    if cfg.profile:
        result["profile"], note = profile_training(models, Path(cfg.out_dir or "out/bench"))
        result["notes"].append(note)
    for model in models.values():
        model.batches.close()
    return result


def profile_training(models, folder):
    """Profile training steps of the baseline and the reduced model, and write their traces to folder.

    Returns model's name -> kind of operation -> share of the time, and a sentence about it.
    """
    make_folder(folder)
    trainer = models["baseline"].trainer
    n_steps = max(1, PROFILED_MICRO_BATCHES * trainer.batch_size // trainer.n_own)
    shares = {}
    for name in ("baseline", "reduced"):
        decode.lay_out(models[name].trainer.model)  # decoding may have stored the weights in another order
        path = folder / f"trace_{name}.json"
        shares[name] = profiling.profile(models[name].step, n_steps, trainer.device, path)
    return shares, (
        f"Time of training steps by kind of operation, from {n_steps} {'step' if n_steps == 1 else 'steps'} of each "
        f"model; the traces, for Perfetto or chrome://tracing, are {folder}/trace_*.json."
    )


def bench(cfg):
    """Measure or plan as a BenchConfig says, print the table and write the files; returns the JSON file's content."""
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    if n_processes > 1:
        raise ValueError(f"bench.py measures a single process, got WORLD_SIZE={n_processes}: start it without torchrun")
    if cfg.json and Path(cfg.json).is_dir():
        raise ValueError(f"--json must name a file, got the folder {cfg.json}: use --json={cfg.json}/speed.json")
    if cfg.json and not Path(cfg.json).parent.is_dir():
        folder = Path(cfg.json).parent
        raise ValueError(f"--json={cfg.json} needs an existing folder, and there is no folder {folder}: create it")
    if cfg.plan:
        measured = planning.read_measured(cfg.measured) if cfg.measured else None
        result = {"plan": planning.plan_rows(cfg.train_config(), measured)}
        text = planning.plan_table(cfg, result["plan"])
    else:
        device = devices.choose_device(cfg.device)
        with tempfile.TemporaryDirectory() as folder, prefer_attention(device):
            result = measure(cfg, timed_config(cfg, Path(folder)))
        text = speed_table.markdown(result)
    print(f"\n{text}", end="")
    if cfg.out_dir:
        make_folder(cfg.out_dir)
        write_text(Path(cfg.out_dir) / "table.md", text)
    if cfg.json:
        write_json(cfg.json, result)
    return result


def main(argv):
    """The command; see the module's docstring."""
    bench(configurator.parse(BenchConfig, argv))


if __name__ == "__main__":
    configurator.run(main)
