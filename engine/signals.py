"""Ctrl-C and SIGTERM, which stop a run, and what is done between the micro-batches of a step."""

import os
import signal
import time


class StopSignal:
    """Within `with`, the first Ctrl-C or SIGTERM sets `requested`; the second acts as if this were not here."""

    def __enter__(self):
        self.requested = False
        self._handlers = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, *_):
        self.requested = True
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
