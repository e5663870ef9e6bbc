"""Stands in for the service where an inference is only gone through: nothing is computed."""

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from maestro_core.artifact import Artifact
from server.answers import Inference
from server.dispatcher import Dispatcher, Tell
from server.interrupt import Interrupt
from server.schemas import InferParameters

Floats = NDArray[np.float32]


class Nothing:
    """Computes nothing: every output is zeros."""

    def __init__(self, artifact: Artifact) -> None:
        self._sample = artifact.manifest.output.shape[1:]

    def run(self, batch: Floats, _point: int, _interrupt: Interrupt | None = None, /) -> Floats:
        """Return zeros (n, …) for a batch of n."""
        return np.zeros((len(batch), *self._sample), np.float32)


class Uncounted:
    """Counts nothing."""

    def answered(self, inference: Inference, total_ms: float, target_ms: float | None) -> None:
        """Forget an answer."""

    def refused(self, code: str, reason: str | None = None) -> None:
        """Forget a refusal."""


class StandIn:
    """What begins inferences as the service does, with a dispatcher of its own."""

    def __init__(self, artifact: Artifact, dispatcher: Dispatcher) -> None:
        self.artifact, self.counting = artifact, Uncounted()
        self._dispatcher = dispatcher
        self._ids = map(str, itertools.count())

    def serving(self) -> "StandIn":
        """Return what serves: this, always."""
        return self

    def begin(
        self, x: Floats, parameters: InferParameters, arrived_s: float, tell: Tell
    ) -> Callable[[], None]:
        """Begin an inference as `Service.begin` does."""
        request = parameters.request(next(self._ids), arrived_s, len(x))
        return self._dispatcher.begin(request, x, tell)

    def close(self) -> None:
        """Let its threads end."""
        self._dispatcher.close()
