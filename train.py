"""Train a GPT, with or without W_Q: config files, then `--key=value` options, set the fields of TrainConfig.

python train.py config/reduced_tied.py                          the paper's protocol, on OpenWebText
python train.py config/quick.py config/reduced_tied.py          the same in two CPU minutes, on the embedded corpus
python train.py config/reduced_tied.py --resume                 go on with that run
python train.py config/reduced_tied.py --weight_decay=2**-6 --out_dir=out/wd6
torchrun --nproc_per_node=8 train.py config/reduced_tied.py     the same run on eight GPUs
"""

import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch

import configurator
import data
from engine import checkpoint, devices, diagnostics, distributed, run_files, runlog, signals
from engine.files import read_json, write_json
from model import GPT
from train_config import TrainConfig

DIAGNOSTIC_WINDOWS = 4


def first_tokens(device):
    """Tokens of the first micro-batch tried with batch_size=0; few on a CPU, which cannot say that memory is short."""
    return 2**16 if device.type == "cuda" else 2**13


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


def accumulate_gradients(model, x, y, batch_size, autocast, scaler, synchronise=lambda on: None):
    """Add the gradient of the mean loss over x and y, (sequences, T), to the parameters; that loss, on the device.

    batch_size: sequences at a time. synchronise: called with True before the last of these, with False before others.
    """
    total = 0.0
    micro_batches = len(x) // batch_size
    for number, (micro_x, micro_y) in enumerate(zip(x.split(batch_size), y.split(batch_size), strict=True), start=1):
        synchronise(number == micro_batches)
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
        self.world = distributed.world()
        self.device = devices.choose_device(cfg.device)
        self.dtype = devices.choose_dtype(cfg.dtype, self.device, cfg)
        self.bins = data.load_bins(cfg.data_dir, cfg.dataset)
        needed = self.bins.manifest["vocab_size"] + (cfg.objective == "mlm")  # one more for the mask token
        if needed > cfg.vocab_size:
            raise ValueError(
                f"{cfg.data_dir}/{cfg.dataset} needs vocab_size={needed} or more for objective={cfg.objective}, and "
                f"the model has vocab_size={cfg.vocab_size}"
            )
        self.n_sequences = cfg.tokens_per_step // cfg.block_size
        self.n_own = cfg.sequences_per_process(self.world.size)  # of a step, in this process
        limit = first_tokens(self.device) // cfg.block_size
        self.batch_size = cfg.batch_size or devices.smaller_batch_size(self.n_own, limit)
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
        if self.world.rank:
            torch.manual_seed(cfg.seed + 2**32 * self.world.rank)  # other units drop out than in the first process
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.set_float32_matmul_precision("high")
        if cfg.recompute:
            devices.recompute_activations(self.model)
        self.compiled = on_cuda if cfg.compile is None else cfg.compile
        self.model.chunked_loss = devices.choose_loss(
            cfg.chunked_loss, cfg.vocab_size, self.device, self.dtype, self.compiled
        )
        self.fast_model, self.synchronise = distributed.spread(
            self.model, self.compiled, cfg.shard, self.world, self.device
        )
        self.autocast = devices.autocast(self.device, self.dtype)
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
        if run_files.holds_run(self.folder) and not (cfg.resume or cfg.eval_only):
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
        self.optimizer.load_state_dict(distributed.cut(self.optimizer, state["optimizer"]))
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best_val_loss = state["step"], state["best_val_loss"]
        self.train_seconds = state["train_seconds"]
        self.started -= state["wall_seconds"]
        if self.world.rank == 0:  # the checkpoint has the random state of the first process
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        else:
            torch.manual_seed(self.cfg.seed + 2**32 * self.world.rank + self.step)
        if state["data_fingerprint"] != self.bins.fingerprint:
            print(f"warning: the data ({self.bins.fingerprint}) is not the checkpoint's ({state['data_fingerprint']})")

    def save(self, link=None):
        """Write ckpt.pt, and make `link` in the same folder stand for it, too."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        weights, optimizer = distributed.whole(self.model.state_dict()), distributed.whole(self.optimizer.state_dict())
        if self.world.rank:
            return
        checkpoint.save(
            self.folder / "ckpt.pt",
            model=weights,
            model_config=dataclasses.asdict(self.model.config),
            optimizer=optimizer,
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
        """This process's part of each step that is left, on the device: x and y, (sequences, block_size) int64."""

        def make(step):
            numbers = self.world.share(step * self.n_sequences + np.arange(self.n_sequences))
            offsets = self.world.share(self.offsets(step))
            batch = self.examples(self.bins.train, offsets, self.cfg.data_seed, numbers)
            return [tokens.pin_memory() for tokens in batch] if self.device.type == "cuda" else batch

        for batch in data.prefetch(make, range(self.step, self.cfg.max_iters)):
            yield [tokens.to(self.device, non_blocking=True) for tokens in batch]

    def update(self, x, y):
        """One optimizer step, without waiting for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.learning_rate_at(self.step)
        context = (self.autocast, self.scaler, self.synchronise)
        loss = self.within_memory(lambda size: accumulate_gradients(self.fast_model, x, y, size, *context))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.unchecked.append((loss, norm))
        self.step += 1

    def within_memory(self, compute):
        """compute(batch_size); with batch_size=0 in smaller micro-batches, from here on, if the memory is too small."""
        while True:
            try:
                return compute(self.batch_size)
            except torch.OutOfMemoryError as error:
                # Several processes would have to shrink together, in the middle of an exchange of gradients.
                if self.cfg.batch_size or self.batch_size == 1 or self.world.size > 1:
                    hint = "" if self.batch_size == 1 else "a smaller batch_size"
                    hint += ", or 0 to find one" * (self.cfg.batch_size > 1 and self.world.size == 1)
                    raise ValueError(
                        f"a micro-batch of {self.batch_size} × {self.cfg.block_size} tokens does not fit into the "
                        f"device's memory: set {hint + ', or ' * bool(hint)}recompute=True"
                    ) from error
            self.optimizer.zero_grad(set_to_none=True)
            self.batch_size = devices.smaller_batch_size(self.n_own, self.batch_size // 2)
            print(f"out of memory: from here on micro-batches of {self.batch_size} sequences")

    def start_clock(self):
        """Time the steps from here to the next check."""
        self.clock = time.perf_counter()

    def check(self):
        """Wait for the device; what a train record says of the last step, after a look at all since the last check.

        Raises FloatingPointError, leaving nonfinite.json in the run folder, when one of them is not finite.
        """
        values = self.world.mean(torch.stack([torch.stack(pair) for pair in self.unchecked])).tolist()
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
            if self.world.rank == 0:
                write_json(self.folder / "nonfinite.json", dump)
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

        padded = np.append(offsets, np.repeat(offsets[-1:], -len(offsets) % self.world.size))
        own = self.world.share(padded)
        losses = self.within_memory(
            lambda size: evaluate(self.fast_model, examples, own, size, self.autocast, self.device)
        )
        return self.world.gather(losses)[: len(offsets)]

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
        with devices.prefer_attention(run.device):
            result = mean_and_error(run.evaluate(run.all_windows))
        runlog.print_summary(result)
        return result
    finished = read_json(run.folder / "summary.json")
    if finished and run.step == cfg.max_iters:
        print(f"{run.folder} is finished: it has its {run.step} steps")
        return finished

    run.world.wait()  # all have seen the folder as it was, before the first writes into it
    start_log = runlog.Silence if run.world.rank else runlog.RunLog
    with (
        start_log(cfg.out_dir, dataclasses.asdict(cfg), runlog.facts(run), run.step) as log,
        devices.prefer_attention(run.device),
        signals.StopSignal() as stop,
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
            log_due, eval_due = run.step % cfg.log_interval == 0, run.step % cfg.eval_interval == 0
            keep, last = run.step in cfg.save_steps, run.step == cfg.max_iters
            stopping = run.world.any(stop.requested)  # a signal may reach the processes at different steps
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
                python = f"torchrun --nproc_per_node={run.world.size}" if run.world.size > 1 else "python"
                log.say(f"stopped; go on with: {python} train.py --out_dir={cfg.out_dir} --resume")
                return None
            run.start_clock()
        losses = evaluate_and_save(run.all_windows)
        return log.finish(runlog.summary(run, mean_and_error(losses)))


def main(argv):
    """The command; see the module's docstring."""
    values = configurator.read(TrainConfig, argv, usage=__doc__)
    names = [Path(path).stem for path in configurator.config_files(argv)]
    if names:
        values.setdefault("out_dir", "out/" + "-".join(names))
    out_dir = values.get("out_dir", TrainConfig.out_dir)
    if values.get("resume") or values.get("eval_only"):
        # What the run was started with need not be repeated.
        stored = read_json(Path(out_dir) / "config.json")
        values = configurator.read(TrainConfig, argv, base=stored)
    result = train(TrainConfig(**{**values, "out_dir": out_dir}))
    distributed.leave()
    return 0 if result else 130  # as a shell says of a command that Ctrl-C ended, so that what depends on it stops, too


if __name__ == "__main__":
    configurator.run(main)
