"""Counts answers, batches and decisions later: some together, when nobody waits for it.

To count takes the event loop from those who wait, and several times as long where computing has
emptied the caches since the last time.
"""

import asyncio
from collections.abc import Callable
from functools import partial

from server.answers import Inference
from server.metrics import Metrics
from server.requests import Batch
from server.statistics import Answer, Statistics

MS = 1e3
# So long at most until it is counted, and so much at once: that takes a fraction of a millisecond.
LATER_S = 0.1
TOGETHER = 32


class Counting:
    """Counts into the metrics and the protocol's statistics, later; `flush` counts now."""

    def __init__(self, metrics: Metrics, statistics: Statistics) -> None:
        self.metrics, self.statistics = metrics, statistics
        self._answers: list[Answer] = []
        self._uncounted: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None

    def answered(self, inference: Inference, total_ms: float, target_ms: float | None) -> None:
        """Count an answer."""
        self._answers.append((inference, total_ms, target_ms))
        self._flush_later()

    def refused(self, code: str, reason: str | None = None) -> None:
        """Count a request that was answered with an error; a `reason` as `Metrics.refused`."""
        self.metrics.refused(code, reason)
        self.statistics.failed()

    def ran(self, batch: Batch, compute_s: float) -> None:
        """Count a batch."""
        self._uncounted.append(partial(self._ran, batch, compute_s))
        self._flush_later()

    def decided(self, decision_s: float) -> None:
        """Count a decision."""
        self._uncounted.append(partial(self.metrics.decided, decision_s))
        self._flush_later()

    def flush(self) -> None:
        """Count what is not counted yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due, self._uncounted = self._uncounted, []
        answers, self._answers = self._answers, []
        for count in due:
            count()
        if answers:
            for inference, total_ms, target_ms in answers:
                self.metrics.answered(inference, total_ms, target_ms)
            self.statistics.answered(answers)

    def _flush_later(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LATER_S, self.flush)
        elif len(self._answers) + len(self._uncounted) == TOGETHER:  # once these are answered
            asyncio.get_running_loop().call_soon(self.flush)

    def _ran(self, batch: Batch, compute_s: float) -> None:
        self.metrics.ran(batch.point, batch.rows, compute_s, batch.predicted_ms / MS)
        self.statistics.ran(batch.rows, MS * compute_s)
