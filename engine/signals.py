"""What stops a run, Ctrl-C, SIGTERM and the end of its time, and what is done between the micro-batches of a step."""

import math
import os
import signal
import time
from pathlib import Path


def process_start():
    """The time.monotonic() at which this process began; now where the system does not tell (other than Linux)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine began
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = 0.0
    return time.monotonic() - max(0.0, age)


class StopSignal:
    """Within `with`, the first Ctrl-C or SIGTERM requests a stop; the second acts as if this were not here.

    max_seconds: how long after `began`, a time.monotonic() (None: now), a stop is requested in any case; None: never.
    """

    BY_SIGNAL = 130  # as a shell says of a command that Ctrl-C ended, so that what depends on it stops, too
    BY_TIME = 75  # "try again" in sysexits.h: a job script can tell it from Ctrl-C, and go on

    def __init__(self, max_seconds=None, began=None):
        self.max_seconds = max_seconds
        self.deadline = (
            math.inf if max_seconds is None else max_seconds + (time.monotonic() if began is None else began)
        )
        self.signalled = False

    @property
    def requested(self):
        """Whether to stop."""
        return self.signalled or time.monotonic() >= self.deadline

    @property
    def why(self):
        """What follows 'stopped', as text: nothing, or how long it ran."""
        return "" if self.signalled else f" after {self.max_seconds:g} seconds"

    @property
    def exit_status(self):
        """That of a command which has stopped."""
        return self.BY_SIGNAL if self.signalled else self.BY_TIME

    def __enter__(self):
        self._handlers = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, *_):
        self.signalled = True
        self.__exit__()
        os.write(2, b"\nstopping; once more to stop at once\n")  # print may not be re-entered


class BetweenMicroBatches:
    """Called before each micro-batch of a step: shows how far a long step is, and says whether to cut it short.

    stop: a StopSignal. say: prints a line. is_alone: whether no other process takes part, since all would have to stop
    together.
    """

    SECONDS = 10  # between two lines

    def __init__(self, stop, say, is_alone):
        self.stop, self.say, self.is_alone = stop, say, is_alone
        self.shown_at = time.monotonic()

    def __call__(self, number, count):
        """Whether to cut the step short before micro-batch `number` of `count`, from 1."""
        now = time.monotonic()
        if number == 1:
            self.shown_at = now
            return False
        if now - self.shown_at >= self.SECONDS:
            self.shown_at = now
            self.say(f"micro-batch {number - 1} of {count}")
        return self.is_alone and self.stop.requested
