"""What Prometheus may ask: one registry per server, seconds everywhere, buckets from 0.5 ms."""

from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_RATIO = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
_TARGET = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "maestro_requests",
            "Inference requests by outcome (ok, late, or the error's code) and point.",
            ["outcome", "point"],
            registry=self.registry,
        )
        self._latency = self._seconds("latency", "From arrival to the answer's hand-over.")
        self._queue = self._seconds("queue", "From arrival to the start of the batch.")
        self._compute = self._seconds("compute", "One batch in the engine.", ["point"])
        self._error = Histogram(
            "maestro_prediction_ratio",
            "Measured over predicted tail latency of a batch.",
            buckets=_RATIO,
            registry=self.registry,
        )
        # Children by their labels: to look one up in the library costs more than to count.
        self._request_of = cache(lambda outcome, point: self._requests.labels(outcome, str(point)))
        self._compute_of = cache(lambda point: self._compute.labels(str(point)))
        self._target = Histogram(
            "maestro_target_ratio",
            "Latency over target, of answers to requests that have one; late above 1.",
            buckets=_TARGET,
            registry=self.registry,
        )
        self._batch = Histogram(
            "maestro_batch_size", "Samples per batch.", buckets=_BATCH, registry=self.registry
        )
        self.queue_depth = Gauge(
            "maestro_queue_depth", "Requests that wait.", registry=self.registry
        )
        self.slowdown = Gauge(
            "maestro_slowdown", "Measured over profiled latency, now.", registry=self.registry
        )
        self.ready = Gauge("maestro_ready", "1 when requests are served.", registry=self.registry)

    def _seconds(self, name: str, text: str, labels: list[str] | None = None) -> Histogram:
        return Histogram(
            f"maestro_{name}_seconds",
            text,
            labels or [],
            buckets=_SECONDS,
            registry=self.registry,
        )

    def answered(self, point: int, queue_s: float, total_s: float, target_s: float | None) -> None:
        """Count an answer."""
        late = target_s is not None and total_s > target_s
        if target_s is not None:
            self._target.observe(total_s / target_s)
        self._request_of("late" if late else "ok", point).inc()
        self._queue.observe(queue_s)
        self._latency.observe(total_s)

    def refused(self, code: str) -> None:
        """Count a request that was answered with an error."""
        self._requests.labels(code, "").inc()

    def ran(self, point: int, size: int, compute_s: float, predicted_s: float) -> None:
        """Count a batch."""
        self._compute_of(point).observe(compute_s)
        self._error.observe(compute_s / predicted_s)
        self._batch.observe(size)

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self.registry)
