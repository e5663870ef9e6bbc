"""What Prometheus may ask: one registry per server, seconds everywhere, buckets from 0.5 ms.

Decisions take less; their buckets begin at 5 µs. The modes of gauges say what several workers'
come to together (`server.processes.counters`).
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.answers import Inference

Cause = Literal["infeasible", "compute", "queue", "several"]

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_DECISION = (5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 2.5e-2)
_RATIO = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
_TARGET = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
_LEAST_MS = 1e-3  # a target of less would make a sum infinite for ever
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter(
            "requests",
            "Inference requests by outcome (ok, late, or the error's code) and point.",
            "outcome",
            "point",
        )
        self._missed = self._counter(
            "missed", "Answers later than their target, by what made them late.", "cause"
        )
        self._shed = self._counter("shed", "Requests refused or given up, by reason.", "reason")
        self._preempted = self._counter(
            "preempted", "Batches interrupted for others; their requests waited again."
        )
        self._preempted_s = self._counter(
            "preempted_seconds", "Computed for batches that were interrupted, and lost."
        )
        self._decision = self._histogram(
            "decision_seconds", "To decide what to run next.", _DECISION
        )
        self._latency = self._histogram(
            "latency_seconds", "From arrival to the answer's hand-over.", _SECONDS
        )
        self._queue = self._histogram(
            "queue_seconds", "From arrival to the start of the batch.", _SECONDS
        )
        self._compute = self._histogram(
            "compute_seconds", "One batch in the engine.", _SECONDS, "point"
        )
        self._error = self._histogram(
            "prediction_ratio", "Measured over predicted tail latency of a batch.", _RATIO
        )
        self._target = self._histogram(
            "target_ratio",
            "Latency over target, of answers to requests that have one; late above 1.",
            _TARGET,
        )
        self._batch = self._histogram("batch_size", "Samples per batch.", _BATCH)
        self.queue_depth = self._gauge("queue_depth", "Requests that wait.", "livesum")
        self.slowdown = self._gauge("slowdown", "Measured over profiled latency, now.", "livemax")
        self.slowdown.set(1.0)  # nothing is known yet; 0 would be a host that takes no time
        self.ready = self._gauge("ready", "1 when requests are served.", "livemin")
        # Children by their labels: to look one up in the library costs more than to count.
        self._request_of = cache(lambda outcome, point: self._requests.labels(outcome, str(point)))
        self._compute_of = cache(lambda point: self._compute.labels(str(point)))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"maestro_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"maestro_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _gauge(
        self, name: str, text: str, together: Literal["livesum", "livemax", "livemin"]
    ) -> Gauge:
        return Gauge(f"maestro_{name}", text, registry=self.registry, multiprocess_mode=together)

    def answered(self, inference: Inference, total_ms: float, target_ms: float | None) -> None:
        """Count an answer."""
        late = target_ms is not None and total_ms > target_ms
        if target_ms is not None:
            self._target.observe(total_ms / max(target_ms, _LEAST_MS))
            if late:
                self._missed.labels(missed_by(inference, total_ms, target_ms)).inc()
        self._request_of("late" if late else "ok", inference.point).inc()
        self._queue.observe(inference.queue_ms / 1e3)
        self._latency.observe(total_ms / 1e3)

    def refused(self, code: str, reason: str | None = None) -> None:
        """Count a request that was answered with an error.

        One that was not wrong in itself, but refused or given up, has a `reason`.
        """
        self._requests.labels(code, "").inc()
        if reason is not None:
            self._shed.labels(reason).inc()

    def decided(self, decision_s: float) -> None:
        """Count a decision."""
        self._decision.observe(decision_s)

    def preempted(self, compute_s: float) -> None:
        """Count a batch that was interrupted after so long."""
        self._preempted.inc()
        self._preempted_s.inc(compute_s)

    def ran(self, point: int, size: int, compute_s: float, predicted_s: float) -> None:
        """Count a batch."""
        self._compute_of(point).observe(compute_s)
        self._error.observe(compute_s / predicted_s)
        self._batch.observe(size)

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self.registry)


def missed_by(inference: Inference, total_ms: float, target_ms: float) -> Cause:
    """Return what made an answer late: that without which it would have been on time.

    `infeasible`: the point is too slow for the target even alone. `compute`: its batch took longer
    than predicted. `queue`: it waited. `several`: no one of these is enough.
    """
    over_ms = total_ms - target_ms
    around_ms = total_ms - inference.queue_ms - inference.compute_ms
    if around_ms + inference.predicted_ms > target_ms:
        return "infeasible"
    if inference.compute_ms - inference.predicted_ms >= over_ms:
        return "compute"
    return "queue" if inference.queue_ms >= over_ms else "several"
