"""How far a preparation is, as a progress bar or as lines."""

import sys
import time


class Progress:
    """A bar in a terminal, elsewhere a line every 30 seconds: bytes done, MB/s and the time left."""

    def __init__(self, what, total, done=0):
        from tqdm import tqdm

        self._bar = tqdm(
            desc=what, total=total, initial=done, unit="B", unit_scale=True, dynamic_ncols=True, mininterval=0.5,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._what, self._total, self._start, self._done = what, total, done, done
        self._began = self._last_line = time.monotonic()

    def update(self, n_bytes):
        """Count n_bytes more."""
        self._bar.update(n_bytes)
        self._done += n_bytes
        now = time.monotonic()
        if self._bar.disable and now - self._last_line > 30:
            self._last_line, seconds = now, now - self._began
            line = self._bar.format_meter(
                self._done, self._total, seconds, initial=self._start, unit="B", unit_scale=True, prefix=self._what
            )
            print(line, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
