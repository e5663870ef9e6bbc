"""Ends a run of ONNX Runtime from another thread. The runtime looks between two operators."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime as ort


class InterruptedRunError(Exception):
    """A run that was ended before it had its outputs."""


class Interrupt:
    """Ends the run that it is given to, or any that it is given to later, before it is done."""

    __slots__ = ("_options",)

    def __init__(self) -> None:
        self._options = ort.RunOptions()

    @property
    def is_set(self) -> bool:
        """Return whether the run is to end."""
        return bool(self._options.terminate)

    def set(self) -> None:
        """End the run; one that has its outputs already keeps them."""
        self._options.terminate = True

    def run(
        self, session: ort.InferenceSession, names: Sequence[str] | None, feed: Mapping[str, Any]
    ) -> list[Any]:
        """Return the outputs of these names, or all.

        Raises:
            InterruptedRunError: it was ended before it had them.
        """
        try:
            return list(session.run(names, feed, self._options))
        except Exception as error:
            if self.is_set:
                raise InterruptedRunError from error
            raise
