import contextlib
import functools
import hashlib
import os
import signal
import subprocess
import sys
import traceback
import types

import numpy as np
import pytest
import torch
from hypothesis import settings

import configurator
import data
import train
from studies import workers
from train import TrainConfig

# How long an example takes depends on what else the machine does.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# The models here are so small that a team of threads would wait at barriers longer than it works, also in processes
# that a test starts.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = dict(
    block_size=16,
    vocab_size=64,
    n_layer=2,
    n_head=2,
    n_embd=16,
    tokens_per_step=8 * 16,
    batch_size=8,
    max_iters=40,
    lr_decay_iters=None,
    warmup_iters=4,
    learning_rate=1e-2,
    eval_interval=10,
    eval_windows=7,
    log_interval=1,
    save_steps=(),
    dataset="tiny",
    dtype="float32",
)


@functools.cache
def learnable_tokens(n_train, n_val, vocab_size, seed):
    """Two arrays of uint16 for write_dataset."""
    generator = np.random.default_rng(seed)
    splits = []
    for n in (n_train, n_val):
        tokens = np.zeros(n, dtype="<u2")
        for i in range(1, n):
            tokens[i] = (
                (tokens[i - 1] * 7 + 3) % vocab_size if generator.random() < 0.9 else generator.integers(vocab_size)
            )
        splits.append(tokens)
    return splits


def write_dataset(folder, n_train=4000, n_val=500, vocab_size=50, seed=0, manifest=True):
    """Bins of a text that can be learnt: each token follows from the one before it, with some noise."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for name, tokens in zip(("train", "val"), learnable_tokens(n_train, n_val, vocab_size, seed), strict=True):
        tokens.tofile(folder / f"{name}.bin")
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        splits[name] = {"tokens": len(tokens), "documents": 1, "sha256": digest}
    if manifest:
        data.write_manifest(
            folder, tokenizer="bytes", vocab_size=vocab_size, eot=0, dtype="uint16", splits=splits, source={}, split={}
        )


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Makes TrainConfigs: a model of a few thousand parameters, a tiny dataset, an empty working directory."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data" / "tiny")

    def make(**overrides):
        values = {**TINY, "out_dir": str(tmp_path / "run"), **overrides}
        return TrainConfig(**{**values, "warmup_iters": min(values["warmup_iters"], values["max_iters"])})

    return make


@pytest.fixture
def command(capsys):
    """Run a command's main as a shell would; (exit status, standard output, standard error)."""

    def run(main, *argv):
        with pytest.raises(SystemExit) as stopped:
            configurator.run(main, [str(argument) for argument in argv])
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


class ForkedTrain:
    """What subprocess.Popen(["python", "train.py", *arguments], …) gives, without the seconds of torch's import."""

    def __init__(self, command, stdout, env, pass_fds, process_group, **_):
        self.status = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.setpgid(0, process_group)
            os.dup2(stdout.fileno(), 1)
            os.dup2(1, 2)
            sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                if descriptor > 2 and descriptor not in pass_fds:  # other runs' locks
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
            os.environ.update(env)
            configurator.run(train.main, command[2:])
            status = 0
        except SystemExit as stopped:
            status = stopped.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self):
        if self.status is None:
            pid, ended = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(ended) if pid else None
        return self.status

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)


@pytest.fixture
def forked(monkeypatch):
    """Let sweeps fork their runs, where that can be done."""
    if sys.platform == "linux":
        names = {"Popen": ForkedTrain, "DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
        monkeypatch.setattr(workers, "subprocess", types.SimpleNamespace(**names))


@pytest.fixture
def traced(monkeypatch):
    """Let torch.compile trace and differentiate, without the code generator, which takes a minute on a CPU."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))


@pytest.fixture
def refuses(command):
    """Check that a command ends as a user's mistake must: exit status 2 and one line that holds all the words."""

    def check(main, *argv, words):
        status, _, error = command(main, *argv)
        assert status == 2, error
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        for word in words:
            assert str(word) in error

    return check
