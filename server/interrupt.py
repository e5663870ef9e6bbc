"""Ends a run of ONNX Runtime from another thread. The runtime looks between two operators."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime as ort


class InterruptedRunError(Exception):
    """A run that was ended before it had its outputs."""


class Interrupt:
    """Ends one run early, or as soon as it begins."""

    __slots__ = ("options",)

    def __init__(self) -> None:
        self.options = ort.RunOptions()

    @property
    def is_set(self) -> bool:
        """Return whether the run is to end."""
        return bool(self.options.terminate)

    def set(self) -> None:
        """End the run; one that has its outputs already keeps them."""
        self.options.terminate = True


def run(
    session: ort.InferenceSession,
    names: Sequence[str] | None,
    feed: Mapping[str, Any],
    interrupt: Interrupt,
) -> list[Any]:
    """Return the outputs of these names, or all.

    Raises:
        InterruptedRunError: it was ended before it had them.
    """
    try:
        return list(session.run(names, feed, interrupt.options))
    except Exception as error:
        if interrupt.is_set:
            raise InterruptedRunError from error
        raise
