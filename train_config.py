"""The options of a training run, its learning-rate schedule and its batch: what `train.py` and the studies agree on."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from model import GPTConfig

# The fields that say where and how a run is computed and what it tells, not what its result is. (The
# micro-batch changes the rounding; what data_dir holds is known by its fingerprint.)
NO_PART_OF_RESULT = {"out_dir", "data_dir", "resume", "eval_only", "log_interval", "save_steps", "diagnostics"}
NO_PART_OF_RESULT |= {"device", "compile", "batch_size", "shard", "recompute", "chunked_loss"}
NO_PART_OF_RESULT |= {"wandb_log", "wandb_project", "wandb_run_name"}


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
    batch_size: int = 12  # sequences in a micro-batch, the rest is accumulated; 0: many, fewer where memory ends
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
    shard: Literal["none", "full"] = "none"  # full: cut the model and its optimizer over all processes (FSDP2)
    recompute: bool = False  # keep no activations within blocks, compute them again: less memory, a third more work
    chunked_loss: bool | None = None  # the loss from a part of the logits at a time; none: where that is faster
    wandb_log: bool = False  # mirror the metrics to Weights & Biases
    wandb_project: str = "wq-identity"  # the W&B project
    wandb_run_name: str | None = None  # the W&B name; none: that of the run folder

    def __post_init__(self):
        super().__post_init__()
        positive = "eval_interval eval_windows log_interval tokens_per_step learning_rate lr_decay_iters".split()
        decays = "weight_decay weight_decay_attn weight_decay_mlp weight_decay_embd".split()
        others = "batch_size max_iters min_lr warmup_iters beta1 beta2 grad_clip seed data_seed".split()
        for name in [*positive, *decays, *others]:
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
        if self.shard == "full" and self.diagnostics:
            raise ValueError("diagnostics=True looks at whole matrices, and shard=full cuts them: set one of the two")
        self.sequences_per_process(n_processes=1)

    def sequences_per_process(self, n_processes):
        """The sequences of a step that each of n_processes computes. Raises ValueError if that is no whole number."""
        unit = n_processes * (self.batch_size or 1) * self.block_size
        if self.tokens_per_step % unit:
            lower = self.tokens_per_step // unit * unit
            near = " or ".join(str(tokens) for tokens in (lower, lower + unit) if tokens)
            factors = f"batch_size={self.batch_size} × " * (self.batch_size > 0) + f"block_size={self.block_size}"
            processes = f" in each of {n_processes} processes" * (n_processes > 1)
            raise ValueError(
                f"tokens_per_step={self.tokens_per_step} is no whole number of micro-batches of {unit // n_processes} "
                f"tokens ({factors}){processes}: the nearest is {near}"
            )
        return self.tokens_per_step // self.block_size // n_processes

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
