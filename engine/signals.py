"""Ctrl-C and SIGTERM, which stop a run between two steps."""

import os
import signal


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
        os.write(2, b"\nstopping after this micro-batch; once more to stop at once\n")  # print may not be re-entered
