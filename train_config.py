"""The options of a training run, its learning-rate schedule and its batch: what `train.py` and the studies agree on."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from configurator import FilePath, require
from model import GPTConfig

# The fields that say where and how a run is computed and what it tells, not what its result is. (The
# micro-batch changes the rounding; what data_dir holds is known by its fingerprint.)
OF_A_CALL = {
    "out_dir",
    "resume",
    "branch_from",
    "eval_only",
    "max_seconds",
}  # which each segment of a run may have anew
NO_PART_OF_RESULT = OF_A_CALL | {"data_dir", "log_interval", "save_steps", "diagnostics"}
NO_PART_OF_RESULT |= {"device", "compile", "batch_size", "shard", "recompute", "chunked_loss"}
NO_PART_OF_RESULT |= {"wandb_log", "wandb_project", "wandb_run_name", "wandb_artifacts"}
SCHEDULE = {
    "max_iters",
    "learning_rate",
    "schedule",
    "warmup_iters",
    "lr_decay_iters",
    "decay_iters",
    "min_lr",
    "decay_lr",
}
A_STUDY = "this is a study, which sweep.py runs: python sweep.py config/study_lr.py config/quick.py"
SECTION_5_1 = "this is Section 5.1's experiment: python -m theory.basis_transfer config/basis_transfer.py"


@dataclass
class TrainConfig(GPTConfig):
    """One training run; the defaults are the paper's protocol (Section 5.2.1 and the authors' configurations)."""

    # data
    data_dir: FilePath = "data"  # where datasets are
    dataset: str = "openwebtext"  # the folder in data_dir that holds train.bin and val.bin
    vocab_size: int = GPTConfig.vocab_size  # rows of the embedding; unless given, those that the data needs, rounded up
    objective: Literal["clm", "mlm"] = "clm"  # causal language modelling, or masked (with causal=False)
    tokens_per_step: int = 480 * 1024  # tokens in one optimizer step, over all micro-batches and processes
    batch_size: int = 12  # sequences in a micro-batch; gradient accumulation does the rest; 0: the most that fit
    seed: int = 1337  # of the initial weights and of dropout
    data_seed: int | None = None  # of the order of the data; none: seed

    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, with AdamW for the rest
    weight_decay: float = 0.1  # of all 2-D parameters; the paper's reduced models have 2**-5
    weight_decay_attn: float | None = None  # of the attention matrices; none: weight_decay
    weight_decay_mlp: float | None = None  # of the MLP matrices; none: weight_decay
    weight_decay_embd: float | None = None  # of both embeddings and the LM head; none: weight_decay
    beta1: float = 0.9  # AdamW's average of the gradient
    beta2: float = 0.95  # AdamW's average of the squared gradient
    grad_clip: float = 1.0  # the largest gradient norm; 0: no clipping

    # schedule
    max_iters: int = 105_000  # optimizer steps
    max_seconds: float | None = None  # of this process, after which it stops with a checkpoint; none: no limit
    learning_rate: float = 6e-4  # the peak
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # after the warm-up; wsd: constant, then a linear decay
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int | None = 600_000  # the step where the cosine ends, be it beyond max_iters; none: max_iters
    decay_iters: int | None = None  # the last steps of schedule=wsd, in which it decays
    min_lr: float | None = None  # where the decay ends; none: learning_rate / 10 for cosine, 0 for wsd
    decay_lr: bool = True  # False: learning_rate throughout, without a warm-up

    # evaluation
    eval_interval: int = 1000  # steps between evaluations; each writes a checkpoint
    eval_windows: int = 2400  # windows of block_size tokens in an evaluation; the last one takes all of val.bin
    eval_only: bool = False  # evaluate the weights of out_dir, or of init_from, on all of val.bin, and write nothing
    diagnostics: bool = False  # record each layer's attention logits, entropy, norms and gradients at evaluations

    # checkpoints
    out_dir: FilePath = "out/train"  # the run folder; unless given, out/ and the names of the config files
    resume: bool = False  # go on with the run in out_dir
    branch_from: FilePath | None = None  # a run's checkpoint, from which this one goes on in a folder of its own
    init_from: FilePath = "scratch"  # or a checkpoint file, ours or nanoGPT's, whose weights the run starts from
    save_steps: tuple[int, ...] = (50_000, 100_000, 105_000)  # steps whose checkpoints are kept

    # system
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: the fastest safe one
    compile: bool | None = None  # torch.compile; none: on CUDA
    shard: Literal["none", "full"] = "none"  # full: shard the model and its optimizer over all processes (FSDP2)
    recompute: bool = False  # activation checkpointing: less memory, a third more work
    chunked_loss: bool | None = None  # the loss from a part of the logits at a time; none: where that is faster

    # logging
    log_interval: int = 10  # steps between metrics and progress lines
    wandb_log: bool = False  # mirror the metrics to Weights & Biases; the local files remain authoritative
    wandb_project: str = "wq-identity"  # the W&B project
    wandb_artifacts: bool = False  # send ckpt.pt and best.pt to W&B at the end
    wandb_run_name: str | None = None  # the W&B name; none: that of the run folder

    HINTS: ClassVar = {
        "lr": "the field is learning_rate",
        "betas": "the fields are beta1 and beta2",
        "eval_iters": "the field is eval_windows, in windows of block_size tokens",
        "gradient_accumulation_steps": "set tokens_per_step, the tokens of a whole step; accumulation follows from it",
        "always_save_checkpoint": "every evaluation writes ckpt.pt, and best.pt where it is the best",
        "backend": "torchrun says which processes there are; nothing need be set",
        **dict.fromkeys(("arms", "control", "grid", "settings"), A_STUDY),
        **dict.fromkeys(("targets", "h"), SECTION_5_1),
    }

    def __post_init__(self):
        super().__post_init__()
        require(
            self,
            positive="eval_interval eval_windows log_interval tokens_per_step learning_rate lr_decay_iters decay_iters "
            "max_seconds",
            not_negative="weight_decay weight_decay_attn weight_decay_mlp weight_decay_embd batch_size seed data_seed "
            "max_iters min_lr warmup_iters beta1 beta2 grad_clip",
        )
        if self.data_seed is None:
            self.data_seed = self.seed
        if max(self.beta1, self.beta2) >= 1:
            raise ValueError(f"beta1 and beta2 must be below 1, got {self.beta1} and {self.beta2}")
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr must be at most learning_rate={self.learning_rate:g}, got {self.min_lr:g}")
        self._check_schedule()
        if self.causal != (self.objective == "clm"):
            raise ValueError(
                f"objective={self.objective} does not go with causal={self.causal}: a decoder (causal=True) learns by "
                "objective=clm, an encoder (causal=False), which sees the next token, by objective=mlm"
            )
        if self.shard == "full" and self.optimizer == "muon":
            raise ValueError("optimizer=muon needs whole matrices, and shard=full shards them: set one of the two")
        if self.shard == "full" and self.diagnostics:
            raise ValueError("diagnostics=True needs whole matrices, and shard=full shards them: set one of the two")
        for name in ("out_dir", "data_dir", "dataset"):
            folder = getattr(self, name)
            if folder is not None and (not folder.strip() or "\n" in folder):
                raise ValueError(f"{name} must name a folder, got {folder!r}")
        self.sequences_per_process(n_processes=1)

    def _check_schedule(self):
        """Raise ValueError, naming the fields, for a schedule that cannot be."""
        is_wsd = self.schedule == "wsd"
        if is_wsd != (self.decay_iters is not None):
            raise ValueError(
                f"decay_iters={self.decay_iters} does not go with schedule={self.schedule}: schedule=wsd needs the "
                "number of its last steps in which it decays, and no other schedule has it (the cosine ends at "
                "lr_decay_iters)"
            )
        if not self.decay_lr and self.schedule != "cosine":
            raise ValueError(f"decay_lr=False leaves no schedule, got schedule={self.schedule}: set one of the two")
        names = ["warmup_iters", *(["decay_iters"] if is_wsd else [])]
        values = [getattr(self, name) for name in names]
        if self.decay_lr and sum(values) > self.max_iters > 0:
            raise ValueError(
                f"{' + '.join(names)} must be at most max_iters={self.max_iters}, got {' + '.join(map(str, values))}: "
                "the learning rate would never reach its peak"
            )

    def sequences_per_process(self, n_processes):
        """The sequences of a step that each of n_processes computes. Raises ValueError if that is no whole number."""
        factors = {"processes": n_processes, "batch_size": self.batch_size, "block_size": self.block_size}
        if n_processes == 1:
            del factors["processes"]
        if self.batch_size == 0:
            del factors["batch_size"]
        unit = math.prod(factors.values())
        if self.tokens_per_step % unit:
            lower = self.tokens_per_step // unit * unit
            nearest = ", ".join(str(tokens) for tokens in (lower, lower + unit) if tokens)
            raise ValueError(
                f"tokens_per_step={self.tokens_per_step} is not divisible by {' × '.join(factors)} = {unit} (nearest: "
                f"{nearest})"
            )
        return self.tokens_per_step // self.block_size // n_processes

    def learning_rate_at(self, step):
        """The learning rate after `step` steps: linear warm-up to the peak, then as schedule says.

        cosine: from the warm-up's end to min_lr at lr_decay_iters. wsd (warm-up, stable, decay; arXiv 2404.06395): the
        peak, then a straight line to min_lr over the last decay_iters of max_iters steps. constant: the peak.
        """
        if not self.decay_lr:
            return self.learning_rate
        if step < self.warmup_iters:
            return self.learning_rate * (step + 1) / (self.warmup_iters + 1)
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "wsd":
            progress = max(0.0, 1 - (self.max_iters - step) / self.decay_iters)
            return self.learning_rate - (self.learning_rate - (self.min_lr or 0.0)) * progress
        end = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
        lowest = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        progress = min(1.0, (step - self.warmup_iters) / max(1, end - self.warmup_iters))
        return lowest + (self.learning_rate - lowest) * (1 + math.cos(math.pi * progress)) / 2

    def learning_rate_sum(self):
        """The sum S of the learning rates of all steps: AdamW's decay alone shrinks weights to exp(−weight_decay·S)."""
        return math.fsum(self.learning_rate_at(step) for step in range(self.max_iters))

    def model_config(self):
        """The GPTConfig among these fields."""
        return GPTConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(GPTConfig)})
