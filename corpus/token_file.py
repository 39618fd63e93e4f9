"""The token file: what is encoded so far, from which an interrupted preparation is resumed."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engine import locks
from engine.files import read_json, write_json

STATE_FORMAT = 2
COMMIT_BYTES = 2**28  # of text between two commits of the token file
CHUNK_BYTES = 2**25  # of the token file that are read at a time


class TokenFile:
    """The tokens of all documents in the order of the source, and the state: how many of them are valid.

    `tokens.bin` only grows; `state.json`, replaced whole at each commit, says how much of it is valid: the rest is cut
    off when a preparation is resumed. Every document ends with the end-of-text token, to which no text is encoded, so
    the file itself says where documents end, and the disk holds nothing but the tokens.

    folder: where both files are. settings: what the tokens depend on, a dict of plain values. files: the record of each
    file that is read, see TextFile. dtype, eot: of the tokens. Raises ValueError when the folder holds tokens of other
    settings or of other files, or when another process is using it, and OSError.
    """

    def __init__(self, folder, settings, files, dtype, eot):
        self.path, self._state_path = Path(folder) / "tokens.bin", Path(folder) / "state.json"
        self._settings, self._files = settings, files
        self._lock = locks.acquire(Path(folder) / "lock")  # as long as it is open
        if self._lock is None:
            raise ValueError(f"another process is preparing data in {folder}: wait until it ends")
        self._committer, self._committing = ThreadPoolExecutor(1), None
        self._file = None
        try:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            self._reset()
            if state := read_json(self._state_path):
                self._resume(state)
            if self.path.stat().st_size < self.size:
                raise ValueError(f"{self.path} is shorter than its state.json says: delete {folder} to start again")
            self._file.truncate(self.size)
            self._lengths = [document_lengths(self.path, dtype, eot, self.documents)]
        except BaseException:
            self.close()
            raise

    def _reset(self):
        self.file, self._file_start = 0, [0, 0, 0]  # the current file; documents, size and text_bytes before it
        self.documents = self.size = self.text_bytes = 0  # so far; size: of tokens.bin, in bytes
        self.use_gigatoken = True  # until it disagrees with tiktoken
        self._lengths = []
        self._uncommitted = 0

    def _resume(self, state):
        folder = self.path.parent
        if state.get("format") != STATE_FORMAT:
            raise ValueError(f"{self._state_path} was written by another version: delete {folder} to start again")
        if state["settings"] != self._settings:
            if not state["reached"][0]:
                return  # nothing was encoded: a wrong --text_column, for example, that has been corrected
            raise ValueError(
                f"{folder} holds an unfinished preparation with other settings ({self._changed(state)}): delete it to "
                "start again, or choose another --out_dir"
            )
        if state["finished_files_sha256"] != self._digest(state["file"]):
            raise ValueError(
                f"files that the unfinished preparation in {folder} has read have changed: delete it to start again"
            )
        self.file, self._file_start = state["file"], state["file_start"]
        self.use_gigatoken = state["use_gigatoken"]
        is_unchanged = state["current_file"] == self._files[self.file : self.file + 1]
        self.documents, self.size, self.text_bytes = state["reached"] if is_unchanged else self._file_start

    def _changed(self, state):
        """What state.json says about the settings that have changed."""
        before, now = ({**settings, **settings["source"]} for settings in (state["settings"], self._settings))
        names = [name for name in {**before, **now} if name != "source" and before.get(name) != now.get(name)]
        return ", ".join(f"{name} was {before.get(name)!r}" for name in names)

    @property
    def file_documents(self):
        """How many documents of the current file are encoded."""
        return self.documents - self._file_start[0]

    def document_ends(self):
        """Where each document ends, in tokens, the end-of-text token included: (documents,) int64."""
        return np.cumsum(np.concatenate(self._lengths))

    def append(self, batch, tokens, lengths):
        """Write the tokens of the next Batch; lengths: how many each document has. Raises OSError."""
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
        """Make what was appended survive the end of the process, or of the machine. Raises OSError."""
        self._file.truncate(self.size)  # an append that failed, on a full disk, may have left a part
        self._committing = None  # what failed before may succeed now
        self._commit()
        self._committing.result()

    def _commit(self):
        """Begin to commit, in a thread, as the disk takes its time; raises what went wrong in the commit before."""
        if self._committing:
            self._committing.result()
        state = {
            "format": STATE_FORMAT,
            "settings": self._settings,
            "finished_files_sha256": self._digest(self.file),
            "file": self.file,
            "current_file": self._files[self.file : self.file + 1],
            "file_start": self._file_start,
            "reached": [self.documents, self.size, self.text_bytes],
            "use_gigatoken": self.use_gigatoken,
        }
        self._committing, self._uncommitted = self._committer.submit(self._write_state, state), 0

    def _write_state(self, state):
        os.fsync(self._file.fileno())
        write_json(self._state_path, state)

    def start_again(self):
        """Discard all tokens, which gigatoken made, as it has disagreed with tiktoken."""
        self._reset()
        self.use_gigatoken = False
        self.commit()

    def close(self):
        """Let another process use the folder."""
        self._committer.shutdown()
        if self._file:
            self._file.close()
        os.close(self._lock)

    def _digest(self, n_files):
        """The SHA-256 of the identities of the first n_files files, whatever becomes of the others."""
        return hashlib.sha256(json.dumps([file["identity"] for file in self._files[:n_files]]).encode()).hexdigest()


def document_lengths(path, dtype, eot, n_documents):
    """How many tokens each document of a token file has, the end-of-text token included: (n_documents,) int64."""
    ends, found, position = np.zeros(n_documents + 1, np.int64), 0, 0
    with open(path, "rb") as file:
        while len(chunk := np.fromfile(file, dtype, CHUNK_BYTES // dtype.itemsize)):
            here = np.flatnonzero(chunk == eot)
            assert found + len(here) <= n_documents, "more end-of-text tokens than documents"
            ends[1 + found : 1 + found + len(here)] = here + (position + 1)
            found += len(here)
            position += len(chunk)
    assert found == n_documents and ends[-1] == position, "the token file does not end with a document"
    return np.diff(ends)
