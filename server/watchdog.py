"""Ends the process when its event loop computes and never comes back: nobody else could answer."""

import logging
import os
import threading
from collections.abc import Callable

log = logging.getLogger("maestro")

# A call that is seen in so many looks in a row hangs. They are counted, in the place of time: a
# process that was stopped for a while looks once and goes on.
LOOKS = 3
LOOK_S = 1.0
# Of the process; what started it starts another.
STATUS = 70


def end() -> None:
    """End the process at once: its threads can't be ended otherwise."""
    log.critical("the engine did not answer the event loop: this process ends")
    os._exit(STATUS)


class Watchdog:
    """Looks at the calls of one thread, from one of its own, and tells of one that hangs."""

    def __init__(self, on_hang: Callable[[], object] = end, look_s: float = LOOK_S) -> None:
        self._on_hang, self._look_s = on_hang, look_s
        self._calls = 0
        self._is_inside = False
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="watchdog", daemon=True).start()

    def __enter__(self) -> None:
        """Have what is called inside looked at."""
        self._calls += 1
        self._is_inside = True

    def __exit__(self, *_: object) -> None:
        self._is_inside = False

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _look(self) -> None:
        seen, looks = 0, 0
        while not self._closed.wait(self._look_s):
            calls = self._calls
            looks = looks + 1 if self._is_inside and calls == seen else 0
            seen = calls
            if looks == LOOKS:
                self._on_hang()
