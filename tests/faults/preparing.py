"""Kills and power cuts during a preparation of token bins."""

import random
import re
import shutil
import signal
from pathlib import Path

import numpy as np

import prepare_owt
from corpus import gathering, reading, token_file
from engine.files import read_json

from . import children
from .disk import Disk
from .events import FileEvents

ARGUMENTS = ["--source=files", "--files=texts", "--out_dir=data/mine", "--tokenizer=bytes", "--val_fraction=0.1"]
N_TEXTS, N_FILES = 400, 3
END_OF_TEXT = 256  # after the 256 bytes


def write_texts(folder):
    """Text files with one JSON object per line."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(N_FILES):
        texts = ["".join(rng.choices("abcdefgh ", k=rng.randint(0, 300))) for _ in range(N_TEXTS)]
        (folder / f"{number}.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))


def small_pieces():
    """Several batches, windows and commits, although there is little text."""
    reading.BATCH_BYTES = 2**14
    gathering.MEMORY_BYTES = gathering.WINDOW_BYTES = 2**16
    token_file.CHUNK_BYTES = token_file.COMMIT_BYTES = 2**15


def result(folder):
    """What a preparation leaves: path -> content; bytes, of meta.json a dict."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return contents | {name: read_json(Path(folder) / name) for name in contents if name.endswith(".json")}


class Preparation:
    """A preparation, uninterrupted, and trials in which it is interrupted and repeated."""

    def __init__(self, folder):
        self.origin, self.trial = Path(folder) / "origin", Path(folder) / "trial"
        write_texts(self.origin / "texts")
        whole = children.fresh(self.trial, self.origin)
        done = self.run(lambda: FileEvents(whole))
        assert done.status == 0, done.describe()
        self.moments, self.expected = done.moments, result(whole / "data")

    def run(self, prepare=None):
        """Run the command in the trial's folder; its Outcome."""

        def begin():
            small_pieces()
            return prepare() if prepare else None

        return children.run(prepare_owt.main, ARGUMENTS, self.trial, begin)

    def repeat(self, reached=0):
        """Run the command to its end: ('' where its bins are as they must be, else what is wrong; documents lost).

        reached: the documents that were encoded before.
        """
        done = self.run()
        if done.status:
            return f"the repeated command failed ({done.describe()})", None
        found = result(self.trial / "data")
        wrong = [name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name)]
        if wrong:
            return f"other content in {', '.join(sorted(wrong))}", None
        if "is prepared already" in done.out:
            return "", 0
        resumed = re.search(r"resuming after ([\d,]+) documents", done.out)
        return "", max(0, reached - int(resumed[1].replace(",", "")) if resumed else reached)


def encoded(folder):
    """How many documents an unfinished preparation has in its token file."""
    path = Path(folder) / "data/mine/unfinished/tokens.bin"
    tokens = np.frombuffer(path.read_bytes()[: path.stat().st_size // 2 * 2], np.uint16) if path.exists() else ()
    return int(np.count_nonzero(np.equal(tokens, END_OF_TEXT)))


def kills(folder, n, rng):
    """Kill the preparation at n moments, spread over all that it has."""
    preparation = Preparation(folder)
    for i in range(n):
        children.fresh(preparation.trial, preparation.origin)
        at = 1 + (i * preparation.moments + rng.randrange(preparation.moments)) // n
        ended = preparation.run(lambda: FileEvents(preparation.trial, at, children.die))  # noqa: B023
        wrong, lost = preparation.repeat(encoded(preparation.trial))
        if ended.status not in (-signal.SIGKILL, 0):  # threads: another run may have a moment less
            wrong = wrong or f"not killed ({ended.describe()})"
        yield f"moment {at} of {preparation.moments}", wrong, lost


def power_cuts(folder, n, rng):
    """Cut the power at n moments: every second time with nothing left that was not flushed."""
    preparation = Preparation(folder)
    trial, after = preparation.trial, Path(f"{preparation.trial}.after")
    for i in range(n):
        children.fresh(trial, preparation.origin)
        at, seed = rng.randint(1, preparation.moments - 2), rng.random()

        def prepare(at=at, seed=seed, some=i % 2):
            disk = Disk(trial)

            def cut():
                disk.cut(str(after), random.Random(seed) if some else None)
                children.die()

            return FileEvents(trial, at, cut, disk)

        ended = preparation.run(prepare)
        documents = encoded(trial)
        if ended.status == -signal.SIGKILL:
            children.fresh(trial, after)
            shutil.rmtree(after)
        wrong, lost = preparation.repeat(documents)
        yield f"moment {at} of {preparation.moments}", wrong, lost
