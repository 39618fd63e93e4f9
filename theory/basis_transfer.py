"""Section 5.1: can an MLP with a skip connection learn a change of basis? Gradient descent against the best linear map.

    python -m theory.basis_transfer config/basis_transfer.py          the paper's protocol, for a CUDA GPU
    python -m theory.basis_transfer config/basis_transfer_quick.py    h = 64, about three minutes on one CPU core
    python -m theory.basis_transfer config/basis_transfer.py --resume

If the residual stream has the basis Ω₂ before an MLP and Ω₁ after it, equation (3) asks for an MLP′ of the same shape
with Ω₁ ∘ (MLP + Id) ∘ Ω₂⁻¹ ≈ MLP′ + Id. The model is equation (5), W₂′·σ(W₁′x) + x; the targets are in
`basis_transfer_target`. The model can represent exactly: identity/identity; any Ω₁ = Ω₂, the case of Theorem 4.2; and,
with width_ratio=6, every target, because σ(u) − σ(−u) = u for GELU and ReLU, so 2h neurons represent any linear map.

Inputs are standard Gaussian; the loss is the mean over samples of ‖ŷ − y‖²/‖y‖². Where the paper says nothing: initial
weights as in nn.Linear, AdamW's β as in torch (0.9, 0.999), a cosine down to 0, no warm-up.
"""

import dataclasses
import itertools
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import configurator
from configurator import FilePath, require
from engine import checkpoint, devices, signals
from model import ACTIVATIONS, MLP, GPTConfig
from theory import basis_transfer_report
from theory.basis_transfer_target import Target, make_target, read_target, stream_seed

SAVE_SECONDS = 40  # between checkpoints, so that a kill loses less than a minute
CHUNK = 4096  # samples at once where no gradient is needed
STATE = ("step", "seconds", "loss_sum", "curve", "result", "samples")  # attributes of a run that its file holds


@dataclass
class BasisTransferConfig:
    """The experiment of Section 5.1; the defaults are the paper's protocol, with three seeds."""

    targets: tuple[str, ...] = ("paper",)  # paper, or Ω₁/Ω₂: each identity, orthogonal, gaussian, gaussian:100; …/same
    h: tuple[int, ...] = (256, 512, 768)  # dimensions of the residual stream
    seeds: tuple[int, ...] = (0, 1, 2)  # each gives another target, other initial weights and other inputs
    steps: int = 20_000  # optimizer steps; 0: only the linear baseline
    batch: int = 65_536  # new inputs in each step
    learning_rate: float = 5e-3  # the peak, where the cosine begins
    weight_decay: float = 0.1  # of both matrices
    grad_clip: float = 3.0  # the largest gradient norm; 0: no clipping
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"  # of the target and of the model
    width_ratio: float = 4.0  # the model's hidden width over h; the target's is 4
    linear_samples: int = 500_000  # inputs to which the linear baseline is fitted
    ridge: float = 1e-6  # the linear baseline's λ, added to sums over all these inputs
    test_samples: int = 32_768  # held-out inputs
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: cuda if there is a GPU
    dtype: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"  # of the model's matrix products in training
    compile: bool | None = None  # torch.compile; none: on CUDA
    out_dir: FilePath = "results/basis_transfer"  # where the results and the checkpoints are written
    resume: bool = False  # continue the runs in out_dir; targets, h and seeds may be added

    def __post_init__(self):
        for name in ("targets", "h", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different values, separated by commas, at least one, got {values}")
        require(
            self,
            positive="batch learning_rate width_ratio linear_samples test_samples",
            not_negative="steps weight_decay grad_clip ridge",
        )
        for h in self.h:
            if h < 2:
                raise ValueError(f"h must be 2 or more, got {h}")
            if self.width_ratio * h % 1:
                raise ValueError(f"width_ratio={self.width_ratio:g} times h={h} must be a whole number of neurons")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be zero or positive, got {min(self.seeds)}")
        for target in self.targets:
            read_target(target)

    def learning_rate_at(self, step):
        """The learning rate after `step` steps: a cosine from the peak to 0."""
        return self.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2


class LinearFit:
    """Ridge regression of y on x, both (n, h), chunk by chunk: the A that minimises Σ‖Ax − y‖² + λ‖A‖², in float64."""

    def __init__(self, h, device="cpu"):
        self.xx, self.xy = torch.zeros(2, h, h, dtype=torch.float64, device=device)
        self.samples = 0

    def add(self, x, y):
        """Add more samples."""
        x, y = x.double(), y.double()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.samples += len(x)

    def solve(self, ridge):
        """A, (h, h) float64."""
        identity = torch.eye(len(self.xx), dtype=torch.float64, device=self.xx.device)
        return torch.linalg.solve(self.xx + ridge * identity, self.xy).T


@contextmanager
def matmul_precision(name):
    """Within `with`, torch.set_float32_matmul_precision(name)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_dtype(name, device):
    """'float32', 'tf32' or 'bfloat16', for the model's matrix products; 'auto' is the fastest of them for h ≥ 64.

    Raises ValueError for tf32 without a CUDA GPU.
    """
    if name == "tf32" and device.type != "cuda":
        raise ValueError("dtype=tf32 needs a CUDA GPU: use float32, bfloat16 or auto")
    if name != "auto":
        if name == "bfloat16" and device.type == "cpu":
            devices.warn_of_slow_products(torch.bfloat16)
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "tf32"
    return "bfloat16" if devices.has_bfloat16_products() else "float32"


class TransferRun:
    """The experiment for one target, dimension h and seed: its linear baseline, its model and the state of training.

    All of that is saved to one file in out_dir. With cfg.resume the constructor reads this file, if there is one, and
    raises ValueError if it was written with other options.
    """

    def __init__(self, cfg, target, h, seed):
        self.cfg, self.facts = cfg, {"target": target, "h": h, "seed": seed}
        self.name = f"{target}, h = {h}, seed {seed}"
        self.path = Path(cfg.out_dir) / f"{target.replace('/', '_').replace(':', '-')}_h{h}_seed{seed}.pt"
        self.device = devices.choose_device(cfg.device)
        self.dtype = choose_dtype(cfg.dtype, self.device)
        self.target = Target(*(matrix.to(self.device) for matrix in make_target(target, h, seed)))
        self.activation = ACTIVATIONS[cfg.activation]()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed("model", h, seed))
            shape = GPTConfig(n_embd=h, n_head=1, mlp_ratio=cfg.width_ratio, activation=cfg.activation)
            self.mlp = MLP(shape).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.mlp.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True
        )
        compiled = self.device.type == "cuda" if cfg.compile is None else cfg.compile
        self.loss = torch.compile(self.relative_squared_error) if compiled else self.relative_squared_error
        self.linear = LinearFit(h, self.device)
        self.generator = torch.Generator(self.device)
        self.step, self.seconds = 0, 0.0  # optimizer steps so far, and the time they took
        self.loss_sum = torch.zeros((), device=self.device)  # since the last point of the curve
        self.curve = []  # [step, relative error]: the root of the mean loss since the previous point
        self.result, self.samples = None, {}  # of a finished run; see `evaluate`
        if cfg.resume and self.path.exists():
            self.restore()

    def options(self):
        """The options, beside target, h and seed, that determine the result of a run."""
        others = ("targets", "h", "seeds", "device", "compile", "out_dir", "resume")
        return {name: value for name, value in dataclasses.asdict(self.cfg).items() if name not in others}

    def save(self):
        """Write the run to its file."""
        checkpoint.save(
            self.path,
            options=self.options(),
            model=self.mlp.state_dict(),
            optimizer=self.optimizer.state_dict(),
            linear=vars(self.linear),
            **{name: getattr(self, name) for name in STATE},
        )

    def restore(self):
        """Read the run from its file."""
        state = checkpoint.load(self.path, map_location=self.device, required=())
        if "options" not in state:
            raise ValueError(f"{self.path} is not a checkpoint of this experiment: choose another --out_dir=…")
        differences = checkpoint.differing(state["options"], self.options())
        if differences:
            raise ValueError(
                f"{self.path} was written with other options ({'; '.join(differences)}): repeat those, or choose "
                "another --out_dir=…"
            )
        self.mlp.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self.linear).update(state["linear"])
        for name in STATE:
            setattr(self, name, state[name])

    def inputs(self, stream, number, n):
        """n standard Gaussian inputs, (n, h) on the device: chunk `number` of a stream of random numbers."""
        h, seed = self.facts["h"], self.facts["seed"]
        self.generator.manual_seed(stream_seed(stream, h, seed, number))
        return torch.randn(n, h, generator=self.generator, device=self.device)

    def relative_squared_error(self, x):
        """The mean of ‖ŷ − y‖²/‖y‖² over the rows of x, (n, h); the matrix products in ŷ are in self.dtype."""
        with torch.no_grad():
            y = self.target(x, self.activation)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            change = self.mlp(x)
        return ((change + x - y).square().sum(-1) / y.square().sum(-1)).mean()

    def update(self):
        """One optimizer step, without waiting for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.learning_rate_at(self.step)
        loss = self.loss(self.inputs("train", self.step, self.cfg.batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.mlp.parameters(), self.cfg.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += loss.detach()
        self.step += 1

    def fit_linear(self):
        """Fit the linear baseline; yields after each chunk of its samples."""
        while self.linear.samples < self.cfg.linear_samples:
            n = min(CHUNK, self.cfg.linear_samples - self.linear.samples)
            x = self.inputs("linear", self.linear.samples // CHUNK, n)
            self.linear.add(x, self.target(x, self.activation))
            yield

    def train(self):
        """Train the model; yields after each step. Raises FloatingPointError if a loss is not finite."""
        every = max(1, self.cfg.steps // 100)
        # TensorFloat-32 for the target's products, and for the model's unless they are in bfloat16.
        precision = "high" if self.device.type == "cuda" and self.dtype != "float32" else "highest"
        while self.step < self.cfg.steps:
            clock = time.perf_counter()
            with matmul_precision(precision):
                self.update()
            if self.step % every == 0 or self.step == self.cfg.steps:
                loss = self.loss_sum.item() / (self.step - (self.curve[-1][0] if self.curve else 0))
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"{self.name}, step {self.step}: the loss is {loss}: start again with a smaller learning_rate"
                    )
                self.curve.append([self.step, math.sqrt(loss)])
                self.loss_sum.zero_()
            self.seconds += time.perf_counter() - clock
            yield

    def finish(self, stop, progress):
        """Finish the run, saving it regularly; False if it was stopped (stop.requested) before the end.

        progress: called with the run after each step.
        """
        saved = time.perf_counter()
        for _ in itertools.chain(self.fit_linear(), self.train()):
            progress(self)
            if stop.requested or time.perf_counter() - saved > SAVE_SECONDS:
                self.save()
                saved = time.perf_counter()
            if stop.requested:
                return False
        self.evaluate()
        self.save()
        return True

    @torch.no_grad()
    def evaluate(self):
        """Set result and samples: the relative L2 error and cosine similarity of each held-out input, in float32."""
        A = self.linear.solve(self.cfg.ridge).float()
        predictions = {"model": lambda x: self.mlp(x) + x} if self.cfg.steps else {}
        predictions["linear"] = lambda x: x @ A.T
        for x in self.inputs("test", 0, self.cfg.test_samples).split(CHUNK):
            y = self.target(x, self.activation)
            for method, predict in predictions.items():
                measures = self.samples.setdefault(method, {})
                for measure, values in basis_transfer_report.errors_and_cosines(predict(x), y).items():
                    measures[measure] = torch.cat((measures.get(measure, values[:0]), values))
        self.result = {
            **self.facts,
            "steps": self.step,
            "batch": self.cfg.batch,
            "device": devices.describe_device(self.device),
            "dtype": self.dtype,
            "train_seconds": round(self.seconds, 1),
            **{
                method: {measure: basis_transfer_report.statistics(values) for measure, values in measures.items()}
                for method, measures in self.samples.items()
            },
            "curve": self.curve,
        }


class Progress:
    """Shows the progress of a run, a bar in a terminal and about ten lines elsewhere; called after each step."""

    def __init__(self, run):
        from tqdm import tqdm

        self.shown, self.first, self.started = len(run.curve), run.step, time.perf_counter()
        self.bar = tqdm(
            total=run.cfg.steps,
            initial=run.step,
            unit="step",
            desc=run.name,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def __call__(self, run):
        if run.step == self.first:  # the linear baseline is still being fitted
            self.started = time.perf_counter()
        self.bar.update(run.step - self.bar.n)
        if len(run.curve) == self.shown:
            return
        self.shown = len(run.curve)
        step, error = run.curve[-1]
        self.bar.set_postfix_str(f"relative error {100 * error:.2f} %", refresh=False)
        if self.bar.disable and (self.shown % 10 == 0 or step == run.cfg.steps):
            rate = (step - self.first) / (time.perf_counter() - self.started)
            print(
                f"{run.name} | step {step}/{run.cfg.steps} | relative error {100 * error:.2f} % | {rate:.2f} steps/s",
                flush=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


def run_all(cfg):
    """Run every target, h and seed of cfg and write the report after each; the results, or None if it was stopped.

    Raises ValueError if out_dir contains runs and cfg.resume is not set, or if they were made with other options.
    """
    folder = Path(cfg.out_dir)
    if not cfg.resume and list(folder.glob("*_h*_seed*.pt")):
        raise ValueError(f"{folder} already contains runs: continue them with --resume, or choose another --out_dir=…")
    results, samples = [], []
    with signals.StopSignal() as stop:
        for target, h, seed in itertools.product(cfg.targets, cfg.h, cfg.seeds):
            run = TransferRun(cfg, target, h, seed)
            folder.mkdir(parents=True, exist_ok=True)
            if run.result is None:
                with Progress(run) as progress:
                    finished = run.finish(stop, progress)
                if not finished:
                    print(f"stopped at step {run.step} of {run.name}; continue with the same command and --resume")
                    return None
            results.append(run.result)
            samples.append(run.samples)
            basis_transfer_report.write(cfg, results, samples)
    return results


def main(argv):
    """The command; see the module's docstring."""
    cfg = configurator.parse(BasisTransferConfig, argv)
    results = run_all(cfg)
    if results is None:
        return 130  # the shell's status for a command stopped by Ctrl-C
    print(basis_transfer_report.table(results))
    print(f"\nwrote {', '.join(f'{cfg.out_dir}/{name}' for name in basis_transfer_report.FILES)}")
    return 0


if __name__ == "__main__":
    configurator.run(main)
