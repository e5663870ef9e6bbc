"""A run that is stopped in the middle, as by Ctrl-C."""

from typing import Any

from rich.progress import Progress


class Stops(Progress):
    """A progress bar, not drawn, that stops what it counts when so many steps are done."""

    def __init__(self, after: int) -> None:
        super().__init__(disable=True)
        self._left = after

    def advance(self, *_: Any, **__: Any) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
