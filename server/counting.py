"""Counts answers, errors, batches and decisions once what was counted is on its way to the client.

Nobody waits for counters.
"""

import asyncio
from collections.abc import Callable
from functools import partial

from server.answers import Inference
from server.metrics import Metrics
from server.requests import Batch
from server.statistics import Answer, Statistics

MS = 1e3


class Counting:
    """Counts into the metrics and the protocol's statistics, later; `flush` counts now."""

    def __init__(self, metrics: Metrics, statistics: Statistics) -> None:
        self.metrics, self.statistics = metrics, statistics
        self._answers: list[Answer] = []
        self._uncounted: list[Callable[[], None]] = []

    def answered(self, inference: Inference, total_ms: float, target_ms: float | None) -> None:
        """Count an answer."""
        self._flush_later()
        self._answers.append((inference, total_ms, target_ms))

    def refused(self, code: str, reason: str | None = None) -> None:
        """Count a request that was answered with an error; a `reason` is the scheduler's."""
        self.metrics.refused(code, reason)
        self.statistics.failed()

    def ran(self, batch: Batch, compute_s: float) -> None:
        """Count a batch."""
        self._flush_later()
        self._uncounted.append(partial(self._ran, batch, compute_s))

    def decided(self, decision_s: float) -> None:
        """Count a decision."""
        self._flush_later()
        self._uncounted.append(partial(self.metrics.decided, decision_s))

    def flush(self) -> None:
        """Count what is not counted yet."""
        due, self._uncounted = self._uncounted, []
        answers, self._answers = self._answers, []
        for count in due:
            count()
        if answers:
            for inference, total_ms, target_ms in answers:
                self.metrics.answered(inference, total_ms, target_ms)
            self.statistics.answered(answers)

    def _flush_later(self) -> None:
        """Count once the answers of this turn of the event loop and of the next are sent."""
        if not self._answers and not self._uncounted:
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self.flush)

    def _ran(self, batch: Batch, compute_s: float) -> None:
        self.metrics.ran(batch.point, batch.rows, compute_s, batch.predicted_ms / MS)
        self.statistics.ran(batch.rows, MS * compute_s)
