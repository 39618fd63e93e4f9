"""Train a GPT, with or without W_Q: config files and `--key=value` options, in this order, set the fields below.

python train.py config/reduced_tied.py                          the paper's protocol, on OpenWebText
python train.py config/quick.py config/reduced_tied.py          the same in two CPU minutes, on the embedded corpus
python train.py config/reduced_tied.py --resume                 go on with that run
python train.py config/reduced_tied.py --weight_decay=2**-6 --out_dir=out/wd6
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
import configurator
import data
import diagnostics
import parallel
import runlog
from model import GPT, GPTConfig

DIAGNOSTIC_WINDOWS = 4


@dataclass
class TrainConfig(GPTConfig):
    """One training run; the defaults are the paper's protocol (Section 5.2.1 and the authors' configurations)."""

    out_dir: str = "out/train"  # the run folder; unless given, out/ and the names of the config files
    data_dir: str = "data"  # where datasets are
    dataset: str = "openwebtext"  # the folder in data_dir that holds train.bin and val.bin
    eval_interval: int = 1000  # steps between evaluations; each writes a checkpoint
    eval_windows: int = 2400  # windows of block_size tokens in an evaluation; the last one takes all of val.bin
    objective: Literal["clm", "mlm"] = "clm"  # causal language modelling, or masked (with causal=False)
    eval_only: bool = False  # evaluate the weights of out_dir, or of init_from, on all of val.bin, and write nothing
    diagnostics: bool = False  # record each layer's attention logits, entropy, norms and gradients at evaluations
    log_interval: int = 10  # steps between metrics and progress lines
    tokens_per_step: int = 480 * 1024  # tokens in one optimizer step, over all micro-batches
    batch_size: int = 12  # sequences in a micro-batch; gradient accumulation follows from tokens_per_step
    max_iters: int = 105_000  # optimizer steps
    learning_rate: float = 6e-4  # the peak
    min_lr: float | None = None  # where the cosine ends; none: learning_rate / 10
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int | None = 600_000  # the step where the cosine ends, be it beyond max_iters; none: max_iters
    decay_lr: bool = True  # warm-up and cosine; False: learning_rate throughout
    beta1: float = 0.9  # AdamW's average of the gradient
    beta2: float = 0.95  # AdamW's average of the squared gradient
    grad_clip: float = 1.0  # the largest gradient norm; 0: no clipping
    weight_decay: float = 0.1  # of all 2-D parameters; the paper's reduced models have 2**-5
    weight_decay_attn: float | None = None  # of the attention matrices; none: weight_decay
    weight_decay_mlp: float | None = None  # of the MLP matrices; none: weight_decay
    weight_decay_embd: float | None = None  # of both embeddings and the LM head; none: weight_decay
    seed: int = 1337  # of the initial weights and of dropout
    data_seed: int | None = None  # of the order of the data; none: seed
    init_from: str = "scratch"  # or a checkpoint file, ours or nanoGPT's, whose weights the run starts from
    resume: bool = False  # go on with the run in out_dir
    save_steps: tuple[int, ...] = (50_000, 100_000, 105_000)  # steps whose checkpoints are kept
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: the fastest safe one
    compile: bool | None = None  # torch.compile; none: on CUDA
    wandb_log: bool = False  # mirror the metrics to Weights & Biases
    wandb_project: str = "wq-identity"  # the W&B project
    wandb_run_name: str | None = None  # the W&B name; none: that of the run folder

    def __post_init__(self):
        super().__post_init__()
        positive = (
            "eval_interval eval_windows log_interval tokens_per_step batch_size learning_rate lr_decay_iters".split()
        )
        decays = "weight_decay weight_decay_attn weight_decay_mlp weight_decay_embd".split()
        for name in [*positive, *decays, *"max_iters min_lr warmup_iters beta1 beta2 grad_clip seed data_seed".split()]:
            value = getattr(self, name)
            if value is not None and (value < 0 or (value == 0 and name in positive)):
                raise ValueError(f"{name} must {'be positive' if name in positive else 'not be negative'}, not {value}")
        if self.data_seed is None:
            self.data_seed = self.seed
        if max(self.beta1, self.beta2) >= 1:
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be below 1")
        if self.causal != (self.objective == "clm"):
            raise ValueError(
                f"objective={self.objective} does not go with causal={self.causal}: a decoder (causal=True) learns by "
                "objective=clm, an encoder (causal=False), which sees the next token, by objective=mlm"
            )
        micro_batch = self.batch_size * self.block_size
        if self.tokens_per_step % micro_batch:
            lower = self.tokens_per_step // micro_batch * micro_batch
            near = " or ".join(str(tokens) for tokens in (lower, lower + micro_batch) if tokens)
            raise ValueError(
                f"tokens_per_step={self.tokens_per_step} is no whole number of micro-batches of {micro_batch} tokens "
                f"(batch_size={self.batch_size} × block_size={self.block_size}): the nearest is {near}"
            )

    def learning_rate_at(self, step):
        """The learning rate after `step` steps: linear warm-up, then a cosine from the peak to min_lr."""
        if not self.decay_lr:
            return self.learning_rate
        if step < self.warmup_iters:
            return self.learning_rate * (step + 1) / (self.warmup_iters + 1)
        end = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
        lowest = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        progress = min(1.0, (step - self.warmup_iters) / max(1, end - self.warmup_iters))
        return lowest + (self.learning_rate - lowest) * (1 + math.cos(math.pi * progress)) / 2

    def model_config(self):
        """The GPTConfig among these fields."""
        return GPTConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(GPTConfig)})


def make_optimizer(model, cfg, device_type):
    """AdamW with a group for each row of Table 2 (attention, MLP, embeddings); 1-D parameters do not decay."""
    decays = {".attn.": cfg.weight_decay_attn, ".mlp.": cfg.weight_decay_mlp, "": cfg.weight_decay_embd, "1-D": 0.0}
    groups = {
        kind: {"params": [], "weight_decay": cfg.weight_decay if decay is None else decay}
        for kind, decay in decays.items()
    }
    for name, parameter in model.named_parameters():
        kind = "1-D" if parameter.dim() < 2 else next(kind for kind in groups if kind in name)
        groups[kind]["params"].append(parameter)
    groups = [group for group in groups.values() if group["params"]]
    betas = (cfg.beta1, cfg.beta2)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=device_type in ("cpu", "cuda"))


def accumulate_gradients(model, x, y, micro_batches, autocast, scaler):
    """Add the gradient of the mean loss over x and y, (sequences, T), to the parameters; that loss, on the device."""
    total = 0.0
    for micro_x, micro_y in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
        with autocast:
            _, loss = model(micro_x, micro_y)
        scaler.scale(loss / micro_batches).backward()
        total = total + loss.detach() / micro_batches
    return total


@torch.no_grad()
def evaluate(model, examples, offsets, batch_size, autocast, device):
    """The mean loss of each window that begins at offsets, (len(offsets),) float64, in nats a predicted token.

    examples: the inputs and targets, (n, block_size) each, of the windows at n offsets.
    """
    # The last micro-batch is filled up, so that a compiled model sees one shape.
    padded = np.append(offsets, np.repeat(offsets[-1:], -len(offsets) % batch_size)).reshape(-1, batch_size)
    losses = []
    model.eval()
    for x, y in data.prefetch(examples, padded):
        with autocast:
            _, loss = model(x.to(device), y.to(device), reduction="none")
        losses.append(loss.view(x.shape).cpu().double().sum(dim=1) / (y >= 0).sum(dim=1))
    model.train()
    return torch.cat(losses)[: len(offsets)].numpy()


def mean_and_error(losses):
    """The mean of losses over windows and its standard error (None for one window), as entries of a record."""
    error = float(losses.std(ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else None
    return {"val_loss": float(losses.mean()), "val_loss_se": error, "windows": len(losses)}


class Trainer:
    """A run after `step` steps: model, optimizer and data. Building one reads everything and writes nothing.

    Raises ValueError when cfg, the data and the run folder do not agree.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.folder = Path(cfg.out_dir)
        self.device = parallel.choose_device(cfg.device)
        self.dtype = parallel.choose_dtype(cfg.dtype, self.device, cfg)
        self.bins = data.load_bins(cfg.data_dir, cfg.dataset)
        needed = self.bins.manifest["vocab_size"] + (cfg.objective == "mlm")  # one more for the mask token
        if needed > cfg.vocab_size:
            raise ValueError(
                f"{cfg.data_dir}/{cfg.dataset} needs vocab_size={needed} or more for objective={cfg.objective}, and "
                f"the model has vocab_size={cfg.vocab_size}"
            )
        self.n_sequences = cfg.tokens_per_step // cfg.block_size
        self.micro_batches = self.n_sequences // cfg.batch_size
        self.offsets(step=0)  # raises while nothing is written if there are too few tokens
        self.all_windows = data.evaluation_offsets(len(self.bins.val), cfg.block_size)
        self.some_windows = data.evaluation_offsets(len(self.bins.val), cfg.block_size, cfg.eval_windows)
        state = self.own_checkpoint()

        torch.manual_seed(cfg.seed)
        self.model = GPT(cfg.model_config())
        if state is not None:
            checkpoint.load_weights(self.model, state)
        elif cfg.init_from != "scratch":
            checkpoint.load_weights(self.model, checkpoint.load(cfg.init_from))
        self.model.to(self.device)
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.set_float32_matmul_precision("high")
        compiled = on_cuda if cfg.compile is None else cfg.compile
        self.fast_model = torch.compile(self.model) if compiled else self.model
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        self.optimizer = make_optimizer(self.model, cfg, self.device.type)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step, self.best_val_loss = 0, math.inf
        self.train_seconds = 0.0  # in optimizer steps, over all segments of the run
        self.started = time.perf_counter()
        self.unchecked = []  # (loss, gradient norm) of the steps since the device was last waited for
        if state is not None:
            self.restore(state)

    def own_checkpoint(self):
        """The latest checkpoint of the run folder, if cfg goes on with it. Raises ValueError for a run in the way."""
        cfg, path = self.cfg, self.folder / "ckpt.pt"
        if runlog.holds_run(self.folder) and not (cfg.resume or cfg.eval_only):
            raise ValueError(f"{self.folder} holds a run: go on with --resume, or start another with --out_dir=…")
        if cfg.resume and not path.exists():
            print(f"{self.folder} has no checkpoint yet: the run begins at step 0")
        elif cfg.resume or (cfg.eval_only and cfg.init_from == "scratch"):
            state = checkpoint.load(path)
            if "optimizer" not in state:
                raise ValueError(f"{path} has weights and no optimizer state: start from it with --init_from={path}")
            checkpoint.check_same_run(state, dataclasses.asdict(cfg), path)
            return state
        return None

    def restore(self, state):
        """Take over everything but the weights from a checkpoint."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best_val_loss = state["step"], state["best_val_loss"]
        self.train_seconds = state["train_seconds"]
        self.started -= state["wall_seconds"]
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        if state["data_fingerprint"] != self.bins.fingerprint:
            print(f"warning: the data ({self.bins.fingerprint}) is not the checkpoint's ({state['data_fingerprint']})")

    def save(self, link=None):
        """Write ckpt.pt, and make `link` in the same folder stand for it, too."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint.save(
            self.folder / "ckpt.pt",
            model=self.model.state_dict(),
            model_config=dataclasses.asdict(self.model.config),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            step=self.step,
            rng=rng,
            best_val_loss=self.best_val_loss,
            config=dataclasses.asdict(self.cfg),
            data_fingerprint=self.bins.fingerprint,
            train_seconds=self.train_seconds,
            wall_seconds=time.perf_counter() - self.started,
        )
        if link:
            checkpoint.link(self.folder / "ckpt.pt", link)

    def offsets(self, step):
        """Where the sequences of the batch after `step` steps begin."""
        return data.batch_offsets(len(self.bins.train), self.cfg.block_size, self.n_sequences, self.cfg.data_seed, step)

    def examples(self, tokens, offsets, data_seed, numbers):
        """Inputs and targets of cfg.objective at offsets, (n, block_size) int64 each; masks follow from the rest."""
        x, y = data.windows(tokens, offsets, self.cfg.block_size)
        if self.cfg.objective == "mlm":
            x, y = data.mask_tokens(x, self.bins.manifest["vocab_size"], data_seed, numbers)
        return x, y

    def batches(self):
        """The batch of each step that is left, on the device: x and y, (n_sequences, block_size) int64."""

        def make(step):
            numbers = step * self.n_sequences + np.arange(self.n_sequences)
            batch = self.examples(self.bins.train, self.offsets(step), self.cfg.data_seed, numbers)
            return [tokens.pin_memory() for tokens in batch] if self.device.type == "cuda" else batch

        for batch in data.prefetch(make, range(self.step, self.cfg.max_iters)):
            yield [tokens.to(self.device, non_blocking=True) for tokens in batch]

    def update(self, x, y):
        """One optimizer step, without waiting for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.learning_rate_at(self.step)
        loss = accumulate_gradients(self.fast_model, x, y, self.micro_batches, self.autocast, self.scaler)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.unchecked.append((loss, norm))
        self.step += 1

    def start_clock(self):
        """Time the steps from here to the next check."""
        self.clock = time.perf_counter()

    def check(self):
        """Wait for the device; what a train record says of the last step, after a look at all since the last check.

        Raises FloatingPointError, leaving nonfinite.json in the run folder, when one of them is not finite.
        """
        values = torch.stack([torch.stack(pair) for pair in self.unchecked]).tolist()
        self.unchecked.clear()
        seconds = time.perf_counter() - self.clock
        self.train_seconds += seconds
        for step, (loss, norm) in enumerate(values, start=self.step - len(values)):
            # With float16 the scaler skips a step whose gradient overflows, and goes on with a smaller scale.
            if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
                continue
            dump = {
                "step": step + 1,
                "loss": str(loss),
                "grad_norm": str(norm),
                "learning_rate": self.cfg.learning_rate_at(step),
                "before": [{"loss": str(a), "grad_norm": str(b)} for a, b in values[: step - self.step]],
                "offsets": self.offsets(step).tolist(),
            }
            data.write_json(self.folder / "nonfinite.json", dump)
            raise FloatingPointError(
                f"step {step + 1}: loss {loss}, gradient norm {norm} (its batch: {self.folder / 'nonfinite.json'}); "
                "the checkpoint before it is intact: resume from it with a smaller learning_rate"
            )
        return {
            "loss": values[-1][0],
            "learning_rate": self.cfg.learning_rate_at(self.step - 1),
            "grad_norm": values[-1][1],
            "tokens_per_second": len(values) * self.cfg.tokens_per_step / seconds,
        }

    def evaluate(self, offsets):
        """The mean loss of each validation window that begins at offsets, (len(offsets),) float64, in nats a token."""

        def examples(some):  # the masks of a window are the same whenever, and by whatever run, it is evaluated
            return self.examples(self.bins.val, some, data_seed=0, numbers=some)

        return evaluate(self.fast_model, examples, offsets, self.cfg.batch_size, self.autocast, self.device)

    def diagnose(self):
        """What `diagnostics.measure` says of the model on the first few of the windows of an evaluation."""
        offsets = self.some_windows[:DIAGNOSTIC_WINDOWS]
        x, y = self.examples(self.bins.val, offsets, data_seed=0, numbers=offsets)
        return diagnostics.measure(self.model, x.to(self.device), y.to(self.device), self.autocast)


def train(cfg):
    """Train as cfg says; the content of summary.json, or None when the run was stopped before its end.

    Raises ValueError before anything is written when cfg, the data and the run folder do not agree, and
    FloatingPointError when a loss or a gradient is not finite.
    """
    run = Trainer(cfg)
    if cfg.eval_only:
        result = mean_and_error(run.evaluate(run.all_windows))
        runlog.print_summary(result)
        return result
    finished = runlog.read_json(run.folder / "summary.json")
    if finished and run.step == cfg.max_iters:
        print(f"{run.folder} is finished: it has its {run.step} steps")
        return finished

    with (
        runlog.RunLog(cfg.out_dir, dataclasses.asdict(cfg), runlog.facts(run), run.step) as log,
        parallel.StopSignal() as stop,
    ):
        log.say(runlog.header(run))

        def evaluate_and_save(windows):
            losses = run.evaluate(windows)
            record = mean_and_error(losses[np.isin(windows, run.some_windows)])  # the same windows at every step
            log.eval(run.step, **record)
            if cfg.diagnostics:
                log.diagnostics(run.step, **run.diagnose())
            is_best = record["val_loss"] < run.best_val_loss
            run.best_val_loss = min(run.best_val_loss, record["val_loss"])
            run.save(link="best.pt" if is_best else None)
            return losses

        if run.step % cfg.eval_interval == 0 and run.step < cfg.max_iters:
            evaluate_and_save(run.some_windows)
        run.start_clock()
        for x, y in run.batches():
            run.update(x, y)
            stopping, last = stop.requested, run.step == cfg.max_iters
            log_due, eval_due = run.step % cfg.log_interval == 0, run.step % cfg.eval_interval == 0
            keep = run.step in cfg.save_steps
            if not (log_due or eval_due or keep or stopping or last):
                continue
            record = run.check()
            if log_due:
                log.train(run.step, **record)
            if eval_due and not (stopping or last):
                evaluate_and_save(run.some_windows)
            if keep or stopping or last:
                run.save(link=f"step_{run.step:06d}.pt" if keep else None)
            if stopping:
                log.say(f"stopped; go on with: python train.py --out_dir={cfg.out_dir} --resume")
                return None
            run.start_clock()
        losses = evaluate_and_save(run.all_windows)
        return log.finish(runlog.summary(run, mean_and_error(losses)))


def main(argv):
    """The command; see the module's docstring."""
    values = configurator.read(TrainConfig, argv)
    names = [Path(path).stem for path in configurator.config_files(argv)]
    if names:
        values.setdefault("out_dir", "out/" + "-".join(names))
    out_dir = values.get("out_dir", TrainConfig.out_dir)
    if values.get("resume") or values.get("eval_only"):
        # What the run was started with need not be repeated.
        stored = runlog.read_json(Path(out_dir) / "config.json")
        values = configurator.read(TrainConfig, argv, base=stored)
    result = train(TrainConfig(**{**values, "out_dir": out_dir}))
    return 0 if result else 130  # as a shell says of a command that Ctrl-C ended, so that what depends on it stops, too


if __name__ == "__main__":
    configurator.run(main)
