"""The paper at the budget one has: what works here, how fast it is, Table 2, and Section 5.1, in one command.

python reproduce.py --minutes=25                 plans from the measured speed of this device, and works through it
python reproduce.py --preset=night --plan        prints the plan, and stops
python reproduce.py --preset=paper --plan        how many days the paper's own protocol takes
python reproduce.py --minutes=25 --bundle=mine.tar.gz     what is worth keeping of out/reproduce, in one file

On a CPU the size is that of config/quick.py on the embedded corpus, with attention scales that suit it; on a GPU the
paper's 124M on OpenWebText, or on --dataset. Each part is processes of the other commands. An interruption costs what a
run's last checkpoint does not have: repeat the command. The report is out/reproduce/report.html, with the newest part
first, and report.md.
"""

import contextlib
import dataclasses
import importlib.util
import io
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import configurator
import data
import train
from configurator import ROOT, FilePath
from engine import checkpoint, decode, devices, run_files
from engine.files import make_folder, read_json, write_json, write_text
from studies import bundle, page, reproduction, reproduction_report
from studies.reproduction_report import TITLES
from train_config import TrainConfig

PRESETS = {"minutes": 25 * 60, "night": 9 * 3600}
STATE = "state.json"  # the plan, and what each part found
OUT_OF_MEMORY, SHARDED = "a micro-batch after running out of memory", "sharded over all GPUs"


@dataclass
class ReproduceConfig:
    """How long it may take, and where."""

    minutes: float | None = None  # the budget; or hours, or a preset
    hours: float | None = None  # the budget
    preset: Literal["minutes", "night", "paper"] | None = None  # 25 minutes, nine hours; paper: with --plan, its days
    plan: bool = False  # print the plan, and stop
    part: Literal[tuple(TITLES)] | None = None  # only this part
    dataset: str | None = None  # in data/; none: stdlib on a CPU, openwebtext on a GPU
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: cuda where there is one
    nanogpt: FilePath | None = None  # a clone of nanoGPT, to be timed beside
    out_dir: FilePath = "out/reproduce"  # the state, the runs and the report
    bundle: FilePath | None = None  # a tar.gz to write of what is worth keeping in out_dir; runs nothing

    def __post_init__(self):
        configurator.require(self, positive="minutes hours")
        given = [name for name in ("minutes", "hours", "preset") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are all budgets: give one of them")
        if not given and not self.bundle:
            raise ValueError("how long may it take? Give --minutes=25, --hours=8 or --preset=minutes, night or paper")
        if self.preset == "paper" and not self.plan:
            raise ValueError(
                "--preset=paper only plans (add --plan): its runs are `python train.py config/baseline_tied.py`, "
                "reduced_tied, baseline_untied and reduced_untied, each with the defaults"
            )

    @property
    def seconds(self):
        """The budget; None for the paper's own protocol."""
        if self.preset == "paper":
            return None
        return 60 * self.minutes if self.minutes else 3600 * self.hours if self.hours else PRESETS[self.preset]


class Reproduction:
    """The state of out_dir, and the processes that change it."""

    def __init__(self, cfg):
        self.cfg, self.folder = cfg, Path(cfg.out_dir)
        self.deadline = time.monotonic() + (cfg.seconds or math.inf)
        self.device = devices.choose_device(cfg.device)
        self.on_gpu = self.device.type != "cpu"
        self.dataset = cfg.dataset or ("openwebtext" if self.on_gpu else "stdlib")
        self.state = read_json(self.folder / STATE) or {"parts": {}}

    @property
    def size(self):
        """The arguments of train.py that set the size, for every run."""
        own = [] if self.on_gpu else ["config/quick.py"]
        own += [f"--dataset={self.dataset}", f"--device={self.cfg.device}"]
        return own + (["--batch_size=0", "--lr_decay_iters=none"] if self.on_gpu else [])

    def save(self):
        """Write the state, whole or not at all."""
        make_folder(self.folder)
        write_json(self.folder / STATE, self.state)

    def run(self, part, *arguments, seconds=None):
        """Run one of our commands, its output in PART.log; (exit status, None where its time was over; seconds)."""
        left = max(1.0, min(seconds or math.inf, self.deadline - time.monotonic()))
        make_folder(self.folder)
        began = time.monotonic()
        with open(self.folder / f"{part}.log", "a", encoding="utf-8") as log:
            print(f"$ {shlex.join(['python', *arguments])}", file=log, flush=True)
            process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=log)
            try:
                status = process.wait(left)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                process.kill()
                status = None
            except BaseException:
                process.terminate()
                raise
        return status, time.monotonic() - began

    def absolute(self, name):
        """The path of a file in out_dir, for processes whose folder is the repository's."""
        return str((self.folder / name).resolve())

    def prepare(self):
        """The embedded corpus, where that is what is trained on and it is not there yet."""
        folder = ROOT / "data" / self.dataset
        if self.dataset == "stdlib" and not (folder / "meta.json").exists():
            status, _ = self.run("prepare", "prepare_owt.py", "--source=stdlib")
            if status:
                raise ValueError(f"the embedded corpus cannot be prepared: see {self.folder / 'prepare.log'}")
        data.load_bins(ROOT / "data", self.dataset, say=lambda text: None)

    def make_plan(self):
        """The Plan, from a measurement of the speed; the one of before where the command is repeated."""
        stored = self.state.get("plan")
        if stored and self.state["seconds"] == self.cfg.seconds:
            return reproduction.Plan(**stored)
        if stored:
            raise ValueError(
                f"{self.folder} holds a plan for {self.state['seconds']:.0f} seconds: repeat it with that budget, or "
                "choose another --out_dir"
            )
        print("measuring the speed of this device", flush=True)
        found = self.measure_speed()
        cfg = configurator.parse(TrainConfig, self.size)
        sizes = reproduction.sizes_of_step(self.on_gpu, cfg)
        plan = reproduction.make_plan(self.cfg.seconds, found["training"], sizes, found["transfer"])
        self.state |= {"plan": dataclasses.asdict(plan), "seconds": self.cfg.seconds, "speed": found}
        self.state["device"] = devices.describe_device(self.device)
        return plan

    def measure_speed(self):
        """tokens/s of training, of both arms the slower, and steps/s of Section 5.1's model."""
        path = self.absolute("speed.json")
        options = ["--only=train", "--repeats=3", "--warmup=1", "--min_seconds=0.5", f"--json={path}"]
        status, _ = self.run("plan", "bench.py", *self.size, *options, seconds=300)
        if status != 0:
            raise ValueError(f"the speed of training cannot be measured: see {self.folder / 'plan.log'}")
        rows = [row for row in read_json(path)["rows"] if row["what"] == "training step"]
        return {
            "training": min(row["tokens_per_second"] for row in rows),
            "transfer": self.transfer_speed(),
        }

    def transfer_speed(self):
        """steps/s of Section 5.1's model, from two lengths that differ by a second: without imports and set-up."""

        def seconds(steps):
            options = [
                *self.transfer_options(steps),
                f"--out_dir={self.absolute(f'transfer_speed_{steps}')}",
                "--resume",
            ]
            return self.run("plan", "-m", "theory.basis_transfer", *options, seconds=300)[1]

        few, steps = seconds(20), 80
        while (more := seconds(steps)) < few + 1 and steps < 20_000:
            steps *= 4
        return (steps - 20) / max(1.0, more - few)

    def transfer_options(self, steps):
        """The options of Section 5.1's experiment; on a CPU a smaller one."""
        own = [f"--steps={steps}", "--seeds=0", f"--device={self.cfg.device}"]
        return own if self.on_gpu else [*own, "--h=64", "--batch=1024", "--linear_samples=50000"]

    # The parts. Each returns what it found, plain values, once it is complete, or None where its time was over.

    def works(self, plan):
        """Each architecture in a process that is replaced where it dies; rows of {name, trains, evaluates, …}."""
        found = self.state.setdefault("works", {})
        until = time.monotonic() + plan.seconds["works"]
        while len(found) < len(self.trials) and time.monotonic() < until:
            before = len(found)
            self.save()
            seconds = until - time.monotonic()
            options = [f"--minutes={self.cfg.seconds / 60}", f"--device={self.cfg.device}", f"--dataset={self.dataset}"]
            self.run(
                "works", "reproduce.py", *options, "--part=works", f"--out_dir={self.absolute('')}", seconds=seconds
            )
            self.state = read_json(self.folder / STATE)
            found = self.state["works"]
            began = self.state.pop("trying", None)
            if began and began not in found and time.monotonic() < until:
                found[began] = {"trains": "the process died: see works.log"}
            if len(found) == before and not began:
                break  # it cannot even begin
        return {"rows": found, "all": len(self.trials)}

    def speed(self, plan):
        """bench.py beside the peers that are here."""
        peers = ["hf"] if importlib.util.find_spec("transformers") else []
        own = [f"--nanogpt={Path(self.cfg.nanogpt).resolve()}"] if self.cfg.nanogpt else []
        peers += ["nanogpt"] if self.cfg.nanogpt else []
        options = [f"--peer={','.join(peers)}"] if peers else []
        options += ["--peer_dtype=float32"] if peers and not self.on_gpu else []
        parts = "train,decode" if self.on_gpu else "train"
        options += [f"--only={parts}", "--repeats=3", "--min_seconds=0.3", *own, f"--out_dir={self.absolute('bench')}"]
        options += ["--profile"] if self.on_gpu else []
        status, _ = self.run("speed", "bench.py", *self.size, *options, seconds=2 * plan.seconds["speed"])
        table = self.folder / "bench" / "table.md"
        return {"table": table.read_text(encoding="utf-8")} if status == 0 and table.exists() else {"table": None}

    def table_2(self, plan):
        """The studies, one after the other, until their time is over."""
        finished = []
        studies = reproduction.studies(plan, small=not self.on_gpu)
        for name, text in studies.items():
            write_text(self.folder / f"{name}.py", text)
            left = self.deadline - time.monotonic() - 0.05 * self.cfg.seconds
            if left < 5:
                break
            options = [*self.size, f"--out_dir={self.absolute(name)}", f"--max_seconds={left:.0f}"]
            status, _ = self.run(name, "sweep.py", self.absolute(f"{name}.py"), *options)
            if status != 0:
                break
            finished.append(name)
        return {"studies": finished} if len(finished) == len(studies) else None

    def section_5_1(self, plan):
        """The experiment with as many steps as fit."""
        options = [*self.transfer_options(plan.transfer_steps), f"--out_dir={self.absolute('transfer')}", "--resume"]
        status, _ = self.run("section_5_1", "-m", "theory.basis_transfer", *options)
        return {"steps": plan.transfer_steps} if status == 0 else None

    def try_architectures(self):
        """The child of `works`: tries each architecture that the state does not have yet, writing after each."""
        for name in self.trials:
            if name not in self.state["works"]:
                self.state["trying"] = name
                self.save()
                with contextlib.redirect_stdout(io.StringIO()):
                    self.state["works"][name] = self.attempt(name)
                self.save()
        self.state.pop("trying", None)
        self.save()

    def attempt(self, name):
        """Try one of `trials`: {what: 'yes', or the reason why not}."""
        if name == OUT_OF_MEMORY:
            return self.try_too_little_memory()
        return self.try_several_gpus() if name == SHARDED else self.try_architecture(name)

    @property
    def trials(self):
        """What `works` tries: the architectures, and on GPUs what takes one whose memory is full, or several."""
        on_gpus = [OUT_OF_MEMORY] * self.on_gpu + [SHARDED] * (self.on_gpu and torch.cuda.device_count() > 1)
        return [*reproduction.ARCHITECTURES, *on_gpus]

    def few_steps(self, name, *more):
        """The arguments of train.py for two steps, on random tokens, of the config files in a name."""
        if not (self.folder / "works" / "random" / "meta.json").exists():
            data.write_random_bins(self.folder / "works" / "random", 2**16, 2**13, vocab_size=256)
        few = "--max_iters=2 --warmup_iters=1 --eval_interval=100 --eval_windows=16 --save_steps=".split()
        few += [
            "--dataset=random",
            f"--out_dir={self.folder / 'works' / name.replace(' ', '-')}",
            f"--data_dir={self.folder / 'works'}",
        ]
        few += ["--n_layer=2"] * self.on_gpu  # compiled in seconds, with every width as it is
        size = [argument if argument.startswith("--") else str(ROOT / argument) for argument in self.size]
        return [*size, *(str(ROOT / "config" / f"{file}.py") for file in name.split()), *few, *more]

    def try_architecture(self, name):
        """Two steps of an architecture, its evaluation, its tokens, and a third step."""
        cfg = configurator.parse(TrainConfig, self.few_steps(name, "--batch_size=4", f"--tokens_per_step={4 * 1024}"))
        folder, found = Path(cfg.out_dir), {}
        resumes = folder.exists()
        found["trains"] = outcome(lambda: train.train(dataclasses.replace(cfg, resume=resumes)))
        found["evaluates"] = outcome(lambda: train.train(dataclasses.replace(cfg, eval_only=True)))
        if cfg.causal:
            found["decodes"] = outcome(lambda: self.decode(folder))
        found["resumes"] = outcome(lambda: train.train(dataclasses.replace(cfg, max_iters=3, resume=True)))
        return found

    def try_too_little_memory(self):
        """Two steps with a micro-batch to be found, on a GPU of which this process may take four gigabytes more."""
        more = [f"--out_dir={self.folder / 'works' / 'memory'}", "--batch_size=0", f"--tokens_per_step={64 * 1024}"]
        more += ["--compile=False", "--resume"]
        cfg = configurator.parse(TrainConfig, self.few_steps("baseline_tied", *more))
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(self.device) + 2**32) / total)
        try:
            return {"trains": outcome(lambda: train.train(cfg))}
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def try_several_gpus(self, n_processes=None):
        """Two steps with parameters, gradients and optimizer sharded over all GPUs."""
        n_processes = n_processes or torch.cuda.device_count()
        more = [f"--out_dir={self.folder / 'works' / 'sharded'}", "--batch_size=4", "--shard=full", "--resume"]
        more += [f"--tokens_per_step={n_processes * 4 * 1024}"]
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n_processes}", "train.py"]
        done = subprocess.run(
            [*command, *self.few_steps("baseline_tied", *more)], cwd=ROOT, capture_output=True, text=True
        )
        errors = [line for line in done.stderr.splitlines() if "rror: " in line] or [f"exit status {done.returncode}"]
        return {"trains": "yes" if done.returncode == 0 else errors[0][:200]}

    def decode(self, folder):
        """Eight greedy tokens with the cache, which must be those without."""
        model = checkpoint.build_model(checkpoint.load(folder / run_files.CHECKPOINT)).eval().to(self.device)
        idx = expected = torch.arange(1, 5, device=self.device)[None]
        with torch.no_grad():
            for _ in range(8):
                expected = torch.cat((expected, model(expected)[0].argmax(-1)), dim=1)
            if not torch.equal(decode.generate(model, idx, 8, temperature=0), expected):
                raise ValueError("the cache changes the tokens")


def outcome(function):
    """'yes', or why a function failed: of torch, of the compiler, of the device, what it says is the result."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    return "yes"


def reproduce(cfg):
    """Work through the plan of a ReproduceConfig; the exit status."""
    run = Reproduction(cfg)
    if cfg.seconds is None:
        speed = None
        if run.on_gpu:
            run.prepare()
            speed = run.measure_speed()["training"]
        print("\n".join(reproduction.paper_days(speed or days_of_this_device(run))))
        return 0
    if cfg.part == "works" and "works" in run.state:
        run.try_architectures()
        return 0
    run.prepare()
    plan = run.make_plan()
    print(page.markdown(reproduction.plan_table(plan, run.state["speed"]["training"], run.state["device"])), flush=True)
    if cfg.plan:
        return 0
    run.save()
    for part in (cfg.part,) if cfg.part else TITLES:
        if part in run.state["parts"]:
            continue
        print(f"{TITLES[part]} …", flush=True)
        began = time.monotonic()
        found = getattr(run, part)(plan)
        if found is not None:
            run.state["parts"][part] = {**found, "seconds": time.monotonic() - began, "finished": time.time()}
            run.save()
        reproduction_report.write(run.folder, run.state, plan)
    print(f"\n{run.folder}/report.md, {run.folder}/report.html")
    if len(run.state["parts"]) < len(TITLES):
        print("not all of it fitted: repeat the command to go on")
    return 0


def days_of_this_device(run):
    """tokens/s of the paper's 124M on a CPU: one micro-batch of two sequences, timed."""
    path = run.absolute("paper_speed.json")
    options = ["config/baseline_tied.py", "--only=train", "--repeats=1", "--warmup=0", "--min_seconds=0"]
    status, _ = run.run("plan", "bench.py", *options, "--batch_size=2", f"--json={path}", seconds=300)
    rows = read_json(path)["rows"] if status == 0 else []
    return next((row["tokens_per_second"] for row in rows if row["model"] == "baseline"), None)


def main(argv):
    """The command; see the module's docstring."""
    cfg = configurator.parse(ReproduceConfig, argv)
    if cfg.bundle:
        names = bundle.write(Path(cfg.out_dir), Path(cfg.bundle))
        print(f"{cfg.bundle}: {len(names)} files, {os.path.getsize(cfg.bundle):,} bytes")
        return 0
    return reproduce(cfg)


if __name__ == "__main__":
    configurator.run(main)
