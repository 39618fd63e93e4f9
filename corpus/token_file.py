"""The token file, which grows while a source is encoded, so that an interrupted preparation goes on."""

import fcntl
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engine.files import write_json

COMMIT_BYTES = 2**28  # of text between two commits of the token file
CHUNK_BYTES = 2**25  # and of the token file that is read at a time


class TokenFile:
    """The tokens of all documents in the order of the source, and how far they go.

    `tokens.bin` only grows; `state.json`, replaced whole at each commit, says how much of it is valid: the rest is cut
    off when a preparation goes on. Every document ends with the end-of-text token, to which no text is encoded, so the
    file itself says where documents end, and the disk holds nothing but the tokens.

    folder: where both files are. settings: what the tokens depend on, a dict of plain values. files: what is read, a
    list [name, bytes, time of change] each. dtype, eot: of the tokens. Raises ValueError when the folder holds the
    tokens of other settings or of other files, or when another process is at work in it.
    """

    def __init__(self, folder, settings, files, dtype, eot):
        self.path, self._state_path = Path(folder) / "tokens.bin", Path(folder) / "state.json"
        self._settings, self._files = settings, files
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._committer, self._committing = ThreadPoolExecutor(1), None
        try:
            self._begin()
            self._lock()
            if self._state_path.exists():
                self._go_on(json.loads(self._state_path.read_text(encoding="utf-8")))
            if self.path.stat().st_size < self.size:
                raise ValueError(f"{self.path} is shorter than it was: delete {folder} to start again")
            self._file.truncate(self.size)
            self._lengths = [document_lengths(self.path, dtype, eot, self.documents)]
        except BaseException:
            self.close()
            raise

    def _begin(self):
        self.file, self._file_start = 0, [0, 0, 0]  # the file in hand; documents, size and text_bytes before it
        self.documents = self.size = self.text_bytes = 0  # so far; size: of tokens.bin, in bytes
        self.distrust = False  # gigatoken has disagreed with tiktoken
        self._lengths = []
        self._uncommitted = 0

    def _lock(self):
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another preparation is at work in {self.path.parent}: wait for it") from error

    def _go_on(self, state):
        folder = self.path.parent
        if state["settings"] != self._settings:
            raise ValueError(f"{folder} holds an unfinished preparation with other settings: delete it to start again")
        if state["digest"] != self._digest(state["file"]):
            raise ValueError(f"files that {folder} was made of have changed since: delete it to start again")
        self.file, self._file_start, self.distrust = state["file"], state["file_start"], state["distrust"]
        unchanged = state["file_in_hand"] == self._files[self.file : self.file + 1]
        self.documents, self.size, self.text_bytes = state["reached"] if unchanged else self._file_start

    @property
    def file_documents(self):
        """How many documents of the file in hand are done."""
        return self.documents - self._file_start[0]

    def document_ends(self):
        """Where each document ends, in tokens, the end-of-text token included: (documents,) int64."""
        return np.cumsum(np.concatenate(self._lengths))

    def append(self, batch, tokens, lengths):
        """Write the tokens of the next Batch; lengths: how many each document has."""
        if batch.file != self.file:
            self.file, self._file_start = batch.file, [self.documents, self.size, self.text_bytes]
        left = memoryview(tokens).cast("B")
        while left:
            left = left[self._file.write(left) :]
        self._lengths.append(lengths)
        self.documents += len(batch.texts)
        self.size += tokens.nbytes
        self.text_bytes += batch.texts.nbytes
        self._uncommitted += batch.texts.nbytes
        if self._uncommitted >= COMMIT_BYTES:
            self._commit()

    def commit(self):
        """Make what was appended survive the end of the process, or of the machine."""
        self._file.truncate(self.size)  # an append that failed may have left a part, on a disk that is full
        self._committing = None  # what went wrong before may go well now
        self._commit()
        self._committing.result()

    def _commit(self):
        """Begin to commit, in a thread, as the disk takes its time; raises what went wrong in the commit before."""
        if self._committing:
            self._committing.result()
        state = {
            "settings": self._settings,
            "digest": self._digest(self.file),
            "file": self.file,
            "file_in_hand": self._files[self.file : self.file + 1],
            "file_start": self._file_start,
            "reached": [self.documents, self.size, self.text_bytes],
            "distrust": self.distrust,
        }
        self._committing, self._uncommitted = self._committer.submit(self._write_state, state), 0

    def _write_state(self, state):
        os.fsync(self._file.fileno())
        write_json(self._state_path, state)

    def start_again(self):
        """Throw the tokens away: gigatoken made them, and it has disagreed with tiktoken."""
        self._begin()
        self.distrust = True
        self.commit()

    def close(self):
        """Let another process work in the folder."""
        self._committer.shutdown()
        self._file.close()

    def _digest(self, n_files):
        """Names the files that are done, whatever becomes of the others."""
        return hashlib.sha256(json.dumps([file[:2] for file in self._files[:n_files]]).encode()).hexdigest()


def document_lengths(path, dtype, eot, n_documents):
    """How many tokens each document of a token file has, the end-of-text token included: (n_documents,) int64."""
    ends, found, position = np.zeros(n_documents + 1, np.int64), 0, 0
    with open(path, "rb") as file:
        while len(chunk := np.fromfile(file, dtype, CHUNK_BYTES // dtype.itemsize)):
            here = np.flatnonzero(chunk == eot)
            assert found + len(here) <= n_documents, "more ends of text than documents"
            ends[1 + found : 1 + found + len(here)] = here + (position + 1)
            found += len(here)
            position += len(chunk)
    assert found == n_documents and ends[-1] == position, "the token file does not end with a document"
    return np.diff(ends)
