"""What a run writes beside its checkpoints: metrics, progress, the summary, and their mirror in Weights & Biases.

The local files are authoritative, W&B is a mirror. `metrics.jsonl` has one JSON object per line, `{"step": …, "kind":
"train", "eval" or "diagnostics", …}`; step counts optimizer steps, so a train record of step n is about the n-th step
and the others are about the weights after it.
"""

import datetime
import json
import platform
import secrets
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import configurator
from engine import devices, run_files
from engine.files import make_folder, read_json, remove_temporaries, write_json
from engine.locks import now
from engine.wandb_mirror import Mirror
from model import GPTConfig
from train_config import OF_A_CALL, SCHEDULE, TrainConfig

MANY_MICRO_BATCHES = 100  # in a step; the paper has 40


class RunLog:
    """Writes one run's folder and tells its progress: a bar in a terminal, plain lines elsewhere.

    folder: where it writes. config: the resolved configuration, a dict of plain values. facts: more for run.json.
    start_step: 0, or the step of the checkpoint from which the run goes on; later metrics are cut off.
    past: what a new folder takes over of the run that it is a branch of (`resuming.past`).
    Raises ValueError when something cannot be written, or when wandb_log is set and the package is missing.
    """

    def __init__(self, folder, config, facts, start_step=0, past=None):
        from tqdm import tqdm

        self.folder = Path(folder)
        make_folder(self.folder)
        remove_temporaries(self.folder)
        past = past or {"config": {}, "facts": {"segments": []}, "records": []}
        run = read_json(self.folder / run_files.FACTS) or past["facts"]
        was, dtype = run.get("dtype"), facts.get("dtype")
        if was not in (None, dtype):  # dtype=auto, on another machine or with another version
            print(f"warning: the run was in {was} and goes on in {dtype}; --dtype={was} keeps it as it was")
        run |= {"git_commit": git_commit(), "versions": versions(), **facts}
        changed = _changed_options(read_json(self.folder / run_files.CONFIG) or past["config"], config, start_step)
        run["segments"].append({"start": now(), "step": start_step, "dtype": dtype, "changed": changed})
        if config["wandb_log"]:
            run.setdefault("wandb_id", secrets.token_hex(4))
        self._mirror = Mirror(self.folder, config, run) if config["wandb_log"] else None
        for name in (run_files.SUMMARY, run_files.NONFINITE):  # a run that goes on is not finished, nor has it diverged
            (self.folder / name).unlink(missing_ok=True)
        write_json(self.folder / run_files.CONFIG, config)
        write_json(self.folder / run_files.FACTS, run)
        self._metrics = run_files.MetricsFile(self.folder, start_step, past["records"])
        self._max_steps, self._tokens_per_step = config["max_iters"], config["tokens_per_step"]
        self._bar = tqdm(
            total=self._max_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def train(self, step, **values):
        """Record one optimizer step: loss (nats per token), learning_rate, grad_norm, tokens_per_second."""
        self._record(step, "train", values)
        left = (self._max_steps - step) * self._tokens_per_step / values["tokens_per_second"]
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s", refresh=False
        )
        self._bar.update(step - self._bar.n)
        if self._bar.disable:
            print(
                f"step {step}/{self._max_steps} | loss {values['loss']:.4f} | lr {values['learning_rate']:.2e}"
                f" | gradient norm {values['grad_norm']:.2f} | {values['tokens_per_second']:,.0f} tokens/s"
                f" | {datetime.timedelta(seconds=round(left))} left",
                flush=True,
            )

    def eval(self, step, **values):
        """Record one evaluation: val_loss (nats per token), val_loss_se (its standard error), windows."""
        self._record(step, "eval", values)
        error = "" if values["val_loss_se"] is None else f" ± {values['val_loss_se']:.4f}"
        self.say(f"step {step}/{self._max_steps} | validation loss {values['val_loss']:.4f}{error}")

    def diagnostics(self, step, **values):
        """Record what `diagnostics.measure` says of the weights after step: lists with a number per layer."""
        self._record(step, "diagnostics", values)

    def warn(self, line):
        """`say` a warning, unless it is None."""
        if line:
            self.say(line)

    def say(self, line):
        """Print a line without breaking the progress bar."""
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.write(line)

    def finish(self, values):
        """Write summary.json, which marks the run as finished, and print it as `key: value` lines; returns values."""
        write_json(self.folder / run_files.SUMMARY, values)
        self._bar.close()
        print(summary_text(values))
        if self._mirror:
            self._mirror.summarise(values)
        return values

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
        self._metrics.close()
        if self._mirror:
            self._mirror.finish()

    def _record(self, step, kind, values):
        self._metrics.append({"step": step, "kind": kind, **values})
        if self._mirror:
            self._mirror.log(step, kind, values)


class Silence:
    """Stands in for a RunLog in all processes of a run but the first."""

    def __init__(self, *_):
        """Takes what a RunLog takes."""

    def train(self, *_, **__):
        """Nothing, like the rest."""

    eval = diagnostics = say = warn = train

    def finish(self, values):
        """Returns values."""
        return values

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Nothing was opened."""


def facts(run):
    """What run.json says of a run (a train.Trainer) beside its configuration."""
    return {
        "parameters": run.model.num_params()._asdict(),
        "data": {"fingerprint": run.bins.fingerprint}
        | {name: run.bins.manifest[name] for name in ("tokenizer", "characters") if name in run.bins.manifest},
        "device": devices.describe_device(run.device),
        "processes": run.world.size,
        "dtype": devices.dtype_name(run.compute.dtype),
    }


def header(run):
    """The lines that a run (a train.Trainer) begins with: what is trained, on what, and how."""
    cfg, compute, parameters = run.cfg, run.compute, run.model.num_params()
    shown = ("block_size", "n_layer", "n_head", "n_embd", "wq_identity", "attn_scale", "tie_weights")  # in other rows
    own, others = cfg.model_config(), [field for field in fields(GPTConfig) if field.name not in shown]
    options = [f"{f.name}={getattr(own, f.name)}" for f in others if getattr(own, f.name) != f.default]
    schedule = f"learning rate {cfg.learning_rate:g}"
    if cfg.decay_lr:
        last = cfg.learning_rate_at(cfg.max_iters)
        then = {
            "cosine": f"cosine decay to {last:.2g} at the last step",
            "wsd": f"linear decay to {last:.2g} over the last {cfg.decay_iters} steps",
            "constant": "then constant",
        }
        schedule += f", {cfg.warmup_iters} warm-up steps, {then[cfg.schedule]}"
    processes = f" in each of {run.world.size} processes" if run.world.size > 1 else ""
    compiled = ", compiled" if compute.compile else ""
    rows = {
        "run": f"{run.folder}, step {run.step} of {cfg.max_iters}",
        "model": f"{cfg.n_layer} layers, {cfg.n_head} heads, n_embd {cfg.n_embd}, "
        f"{'W_Q = I' if cfg.wq_identity else 'with W_Q'}, attention scale {_attention_scale(cfg)}, "
        f"{'tied' if cfg.tie_weights else 'untied'} embeddings",
        "options": ", ".join(options) or "the other model options have their defaults",
        "parameters": f"{parameters.total:,} ({parameters.attn_mlp:,} in attention + MLP)",
        "data": f"{cfg.data_dir}/{cfg.dataset} ({run.bins.manifest['tokenizer']}, fingerprint {run.bins.fingerprint}): "
        f"{len(run.bins.train):,} training tokens, {len(run.bins.val):,} validation tokens",
        "step": f"{cfg.tokens_per_step:,} tokens: {run.n_own // run.batch_size} × {run.batch_size} sequences of "
        f"{cfg.block_size}{processes}",
        "schedule": f"{schedule}; weight decay {cfg.weight_decay:g}",
        "device": f"{devices.describe_device(run.device)}, {devices.dtype_name(compute.dtype)}{compiled}",
    }
    return "\n".join(f"{name:<10}  {row}" for name, row in rows.items())


def advice(run):
    """A warning of a step of very many micro-batches, as the paper's are for a small model; None where it has few."""
    count, cfg = run.n_own // run.batch_size, run.cfg
    if count <= MANY_MICRO_BATCHES:
        return None
    return (
        f"warning: a step of {cfg.tokens_per_step:,} tokens is {count} micro-batches of {run.batch_size} × "
        f"{cfg.block_size}: for a small run set fewer tokens, such as "
        f"--tokens_per_step={16 * run.batch_size * cfg.block_size}, or a larger --batch_size"
    )


def _attention_scale(cfg):
    """The scale of each kind of layer, and the standard deviation that logits have with it at the start, as text."""
    scales = {cfg.attn_scale_in(layer): cfg.unscaled_logit_std(layer, cfg.n_embd) for layer in range(cfg.n_layer)}
    text = ", then ".join(f"{scale:.3g}/√{cfg.d_k}" for scale in scales)
    if cfg.norm not in ("layernorm", "rmsnorm"):
        return text
    return f"{text} (logits of ± {', then '.join(f'{scale * std:.2g}' for scale, std in scales.items())} at the start)"


def summary(run, validation):
    """The content of summary.json for a run (a train.Trainer); validation: the entries about all of val.bin."""
    last = [record["loss"] for record in run_files.read_metrics(run.folder) if record["kind"] == "train"][-10:]
    tokens = run.step * run.cfg.tokens_per_step
    return {
        **validation,
        **run.in_bits_per_byte(validation["val_loss"]),
        "best_val_loss_during_training": run.best_val_loss,  # of eval_windows windows, not of all
        "train_loss": statistics.fmean(last) if last else None,  # over the last ten train records
        "train_loss_se": statistics.stdev(last) / len(last) ** 0.5 if len(last) > 1 else None,
        "steps": run.step,
        "tokens": tokens,
        "tokens_per_second": tokens / run.train_seconds if run.train_seconds else None,
        "train_seconds": run.train_seconds,
        "wall_seconds": time.perf_counter() - run.started,
        "peak_memory_gib": devices.peak_memory_bytes(run.device) / 2**30,
        "out_dir": str(run.folder),
    }


def resume_command(cfg, world):
    """The command that goes on with a run, to be pasted into a shell."""
    python = ["torchrun", f"--nproc_per_node={world.size}"] if world.size > 1 else ["python"]
    return shlex.join([*python, "train.py", f"--out_dir={cfg.out_dir}", "--resume"])


def summary_text(values):
    """A summary as `key: value` lines, one for each entry."""
    return "\n".join(["---", *(f"{name}: {value}" for name, value in values.items())])


def git_commit():
    """The commit that runs, with '+changes' when files differ from it; None outside a git checkout."""
    try:
        command = "git describe --always --abbrev=40 --exclude=* --dirty=+changes".split()
        done = subprocess.run(command, cwd=configurator.ROOT, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def versions():
    """The versions of Python and of the libraries that a run's numbers depend on."""
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": metadata.version("numpy")}


def _changed_options(before, after, step):
    """name -> [before, after] of the options that a resumed run, or a branch, changes after `step` steps.

    Those of the schedule count where they change the learning rate of a step that is done: else it is a run of `after`.
    """
    before, after = json.loads(json.dumps([before, after]))  # tuples are lists in config.json
    names = [name for name in after if name in before and name not in OF_A_CALL and before[name] != after[name]]
    if SCHEDULE & set(names):
        own = ({name: values[name] for name in SCHEDULE & values.keys()} for values in (before, after))
        one, other = (TrainConfig(**values) for values in own)
        if all(one.learning_rate_at(i) == other.learning_rate_at(i) for i in range(step)):
            names = [name for name in names if name not in SCHEDULE]
    return {name: [before[name], after[name]] for name in names}
