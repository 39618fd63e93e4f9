"""Train a GPT, with or without W_Q: config files, then `--key=value` options, set the fields of TrainConfig.

python train.py config/reduced_tied.py                          the paper's protocol, on OpenWebText
python train.py config/quick.py config/reduced_tied.py          the same in two CPU minutes, on the embedded corpus
python train.py config/reduced_tied.py --resume                 go on with that run
python train.py config/reduced_tied.py --weight_decay=2**-6 --out_dir=out/wd6
python train.py --branch_from=out/wd6/ckpt.pt --max_iters=110_000 --out_dir=out/longer     go on, in another folder
torchrun --nproc_per_node=8 train.py config/reduced_tied.py     the same run on eight GPUs
"""

import contextlib
import dataclasses
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import configurator
import data
from engine import checkpoint, devices, diagnostics, distributed, divergence, locks, resuming, run_files, runlog
from engine.attention import prefer_attention
from engine.files import read_json
from engine.optimizer import make_optimizer
from engine.signals import BetweenMicroBatches, StopSignal, process_start
from model import GPT
from train_config import TrainConfig


def mean_and_error(losses):
    """The mean of losses over windows and its standard error (None for one window), as entries of a record."""
    error = float(losses.std(ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else None
    return {"val_loss": float(losses.mean()), "val_loss_se": error, "windows": len(losses)}


class Trainer:
    """A run after `step` steps: model, optimizer and data. Building one reads everything and writes nothing.

    world: the processes of the run. Raises ValueError when cfg, the data and the run folder do not agree.
    """

    def __init__(self, cfg, world=distributed.ALONE):
        self.cfg, self.world, self.folder = cfg, world, Path(cfg.out_dir)
        self.compute = devices.resolve(cfg, world)
        self.device, self.batch_size = self.compute.device, self.compute.batch_size
        self.bins = data.load_bins(cfg.data_dir, cfg.dataset, world.say)
        data.check_vocabulary(self.bins, cfg)
        self.n_sequences = cfg.tokens_per_step // cfg.block_size  # of a step
        self.n_own = cfg.sequences_per_process(world.size)  # of these, in this process
        self.offsets(step=0)  # raises while nothing is written if there are too few tokens
        self.all_windows = data.evaluation_offsets(len(self.bins.val), cfg.block_size)
        self.some_windows = data.evaluation_offsets(len(self.bins.val), cfg.block_size, cfg.eval_windows)
        state = resuming.find_checkpoint(cfg, world.say)
        torch.manual_seed(cfg.seed)
        self.model = GPT(cfg.model_config(), self.compute.linear_loss)
        if state is not None:
            checkpoint.load_weights(self.model, state)
        elif cfg.init_from != resuming.SCRATCH:
            resuming.take_weights(self, checkpoint.load(cfg.init_from))
        self.model.to(self.device)
        torch.manual_seed(cfg.seed + 2**32 * world.rank)  # of dropout: the same in all arms, another in each process
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        elif self.device.type == "cpu":
            devices.keep_freed_memory()
        if cfg.recompute:
            devices.checkpoint_activations(self.model)
        self.fast_model = distributed.wrap_model(self.model, self.compute.compile, cfg.shard, world, self.device)
        self.optimizer = make_optimizer(self.model, cfg, self.device.type)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.compute.dtype == torch.float16)
        self.step, self.best_val_loss, self.links = 0, math.inf, []
        self.past = None  # of a branch: what the run that it comes from says of the steps before
        self.train_seconds = 0.0  # in optimizer steps, over all segments of the run
        self.started = time.perf_counter()
        self.unchecked = []  # (loss, gradient norm) of the steps since the device was last waited for
        if state is not None:
            resuming.restore(self, state)

    def update(self, x, y, between=None):
        """One optimizer step on x and y, (sequences, block_size) int64 each, without waiting for the device.

        between: a signals.BetweenMicroBatches. False, with nothing changed, where it cut the step short; else True.
        """
        random_state = devices.random_state(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        loss, micro_batches = 0.0, list(zip(x.split(self.batch_size), y.split(self.batch_size), strict=True))
        for number, (micro_x, micro_y) in enumerate(micro_batches, start=1):
            if between and between(number, len(micro_batches)):
                devices.set_random_state(random_state, self.device)
                return False
            distributed.sync_gradients(self.fast_model, number == len(micro_batches))
            with self.compute.autocast:
                _, micro_loss = self.fast_model(micro_x, micro_y)
            self.scaler.scale(micro_loss / len(micro_batches)).backward()
            loss = loss + micro_loss.detach() / len(micro_batches)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of all shards
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.learning_rate_at(self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.unchecked.append((loss, norm))
        self.step += 1
        return True

    def within_memory(self, work, *arguments):
        """work(*arguments), which goes by batch_size: where memory ends, again in smaller micro-batches, from here on.

        Raises ValueError when none is smaller, or none may be tried (`devices.next_batch_size`).
        """
        while True:
            try:
                return work(*arguments)
            except RuntimeError as error:
                self.batch_size = devices.next_batch_size(error, self.cfg, self.batch_size, self.world.size)

    @torch.no_grad()
    def evaluate(self, offsets):
        """The mean loss of each validation window that begins at offsets, (n,) float64, in nats per predicted token."""
        # Filled up, so that each process has as many micro-batches, and a compiled model sees one shape.
        missing = -len(offsets) % (self.world.size * self.batch_size)
        own = self.world.share(np.append(offsets, np.repeat(offsets[-1:], missing)))
        losses = []
        self.fast_model.eval()
        for x, y in data.prefetch(self.validation_examples, own.reshape(-1, self.batch_size)):
            with self.compute.autocast:
                _, loss = self.fast_model(x.to(self.device), y.to(self.device), reduction="none")
            losses.append(loss.view(x.shape).cpu().double().sum(dim=1) / (y >= 0).sum(dim=1))
        self.fast_model.train()
        return self.world.gather(torch.cat(losses).numpy())[: len(offsets)]

    def diagnose(self):
        """What `diagnostics.measure` says of the model on the first few of the windows of an evaluation."""
        x, y = self.validation_examples(self.some_windows[:4])
        return diagnostics.measure(self.model, x.to(self.device), y.to(self.device), self.compute.autocast)

    def batches(self):
        """This process's part of each step that is left, on the device: x and y, (sequences, block_size) int64."""

        def make(step):
            numbers = self.world.share(step * self.n_sequences + np.arange(self.n_sequences))
            offsets = self.world.share(self.offsets(step))
            batch = self.examples(self.bins.train, offsets, self.cfg.data_seed, numbers)
            return [tokens.pin_memory() for tokens in batch] if self.device.type == "cuda" else batch

        for batch in data.prefetch(make, range(self.step, self.cfg.max_iters)):
            yield [tokens.to(self.device, non_blocking=True) for tokens in batch]

    def offsets(self, step):
        """Where the sequences of the batch after `step` steps begin."""
        return data.batch_offsets(len(self.bins.train), self.cfg.block_size, self.n_sequences, self.cfg.data_seed, step)

    def examples(self, tokens, offsets, data_seed, numbers):
        """Inputs and targets of cfg.objective at offsets, (n, block_size) int64 each; masks follow from the rest."""
        x, y = data.windows(tokens, offsets, self.cfg.block_size, self.cfg.vocab_size)
        if self.cfg.objective == "mlm":
            x, y = data.mask_tokens(x, self.bins.manifest["vocab_size"], data_seed, numbers)
        return x, y

    def validation_examples(self, offsets):
        """Inputs and targets of the validation windows at offsets; the masks of a window are the same in every run."""
        return self.examples(self.bins.val, offsets, data_seed=0, numbers=offsets)

    def in_bits_per_byte(self, loss):
        """A validation loss as the entry bits_per_byte of a summary; none for masked tokens, or unknown bytes."""
        bits = data.bits_per_byte(loss, self.bins.manifest) if self.cfg.objective == "clm" else None
        return {} if bits is None else {"bits_per_byte": bits}

    def start_clock(self):
        """Time the steps from here to the next check."""
        self.clock = time.perf_counter()

    def check(self):
        """Wait for the device and look at the steps since the last check: a train record of the last; None without any.

        Raises FloatingPointError, leaving nonfinite.json in the run folder, when one of them is not finite.
        """
        if not self.unchecked:
            return None
        values = self.world.mean(torch.stack([torch.stack(pair) for pair in self.unchecked])).tolist()
        self.unchecked.clear()
        seconds = time.perf_counter() - self.clock
        self.train_seconds += seconds
        for step, (loss, norm) in enumerate(values, start=self.step - len(values)):
            # With float16 the scaler skips a step whose gradient overflows, and goes on with a smaller scale.
            if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
                continue
            if self.world.rank == 0:
                before = values[: len(values) - (self.step - 1 - step)]
                divergence.dump(self.folder, step, before, self.cfg.learning_rate_at(step), self.offsets(step))
            raise FloatingPointError(
                f"step {step + 1}: loss {loss}, gradient norm {norm} (its batch: {self.folder / run_files.NONFINITE}); "
                "the checkpoint before it is intact: continue it with --resume and a smaller learning_rate"
            )
        return {
            "loss": values[-1][0],
            "learning_rate": self.cfg.learning_rate_at(self.step - 1),
            "grad_norm": values[-1][1],
            "tokens_per_second": len(values) * self.cfg.tokens_per_step / seconds,
        }


def train(cfg, stop=None):
    """Train as cfg says; the content of summary.json, or None when the run was stopped before its end.

    stop: the signals.StopSignal that stops it; None: one whose time begins now.
    Raises ValueError before anything is written when cfg, the data and the run folder do not agree, and
    FloatingPointError when a loss or a gradient is not finite.
    """
    world, stop = distributed.start(), stop or StopSignal(cfg.max_seconds)
    writes = world.rank == 0 and not cfg.eval_only
    with locks.only_writer(cfg.out_dir) if writes else contextlib.nullcontext():
        run = Trainer(cfg, world)
        if cfg.eval_only:
            with prefer_attention(run.device):
                result = mean_and_error(run.within_memory(run.evaluate, run.all_windows))
            result |= run.in_bits_per_byte(result["val_loss"])
            world.say(runlog.summary_text(result))
            return result
        finished = read_json(run.folder / run_files.SUMMARY)
        if finished and run.step == cfg.max_iters:
            world.say(f"{run.folder} is finished: it has its {run.step} steps")
            return finished
        world.barrier()  # all have seen the folder as it was, before the first writes into it
        start_log = runlog.Silence if world.rank else runlog.RunLog
        watch = divergence.Watch(run.folder, cfg.vocab_size)
        with (
            run_files.no_trace_of_a_failed_start(run.folder, run.step) if world.rank == 0 else contextlib.nullcontext(),
            start_log(cfg.out_dir, dataclasses.asdict(cfg), runlog.facts(run), run.step, run.past) as log,
            prefer_attention(run.device),
            stop,
        ):
            log.say(runlog.header(run))
            log.warn(runlog.advice(run))
            resuming.make_links(run)
            between = BetweenMicroBatches(stop, log.say, world.size == 1)

            def evaluate_and_save(windows):
                losses = run.within_memory(run.evaluate, windows)
                record = mean_and_error(losses[np.isin(windows, run.some_windows)])  # the same windows at every step
                log.eval(run.step, **record)
                if cfg.diagnostics:
                    log.diagnostics(run.step, **run.diagnose())
                is_best = record["val_loss"] < run.best_val_loss
                run.best_val_loss = min(run.best_val_loss, record["val_loss"])
                resuming.save(run, is_best)
                return losses

            if run.step % cfg.eval_interval == 0 and run.step < cfg.max_iters:
                evaluate_and_save(run.some_windows)
            run.start_clock()
            for x, y in run.batches():
                done = run.within_memory(run.update, x, y, between)
                log_due, eval_due = (done and run.step % n == 0 for n in (cfg.log_interval, cfg.eval_interval))
                last = run.step == cfg.max_iters
                stopping = world.any(stop.requested)  # it may reach the processes at different steps
                if not (log_due or eval_due or stopping or last or run.step in cfg.save_steps):
                    continue
                record = run.check()
                if log_due:
                    log.train(run.step, **record)
                    log.warn(watch.warning(record["loss"]) if world.rank == 0 else None)
                if eval_due and not (stopping or last):
                    evaluate_and_save(run.some_windows)
                elif stopping or last or run.step in cfg.save_steps:
                    resuming.save(run)
                if stopping:
                    log.say(f"stopped{stop.why}; continue with: {runlog.resume_command(cfg, world)}")
                    return None
                run.start_clock()
            losses = evaluate_and_save(run.all_windows)
            return log.finish(runlog.summary(run, mean_and_error(losses)))


def main(argv, began=None):
    """The command; see the module's docstring. began: the time.monotonic() from which max_seconds counts; None: now."""
    cfg = TrainConfig(**data.with_vocabulary(resuming.options(argv, usage=__doc__), TrainConfig))
    stop = StopSignal(cfg.max_seconds, began)
    result = train(cfg, stop)
    distributed.shutdown()
    return 0 if result else stop.exit_status


if __name__ == "__main__":
    configurator.run(partial(main, began=process_start()))
