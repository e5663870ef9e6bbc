"""Latencies laid out for look-up by the selector. Pure data, made once per profile."""

import math

from server.latencies import Latencies

MS = 1e3
# Rows up to which the time to work off a queue is tabulated.
TABULATED = 2048


class Tables:
    """`p50_ms` and `tail_ms` are columns: [rows - 1][point], rising along the points.

    best[p]: the most accurate of points 0..p, reached[p] its accuracy. unit_ms[p]: a row's share
    of the batch size that gets most rows a second through, full_batch[p]. prices[p]: what time is
    worth when the load is such that all can run at p, in accuracy per ms; prices[-1] when not even
    0 carries it. drains_ms[r]: how long one slot usually takes for r rows at point 0.
    batches_ms and batch_tails_ms: the median and the tail of a batch at point 0, for each of the
    batch sizes that a queue is worked off in, batch_sizes. The rest is as in `latencies`.
    """

    __slots__ = (
        "accuracy",
        "batch_sizes",
        "batch_tails_ms",
        "batches_ms",
        "best",
        "drains_ms",
        "full_batch",
        "latencies",
        "max_batch",
        "overhead_ms",
        "overhead_s",
        "p50_ms",
        "prices",
        "reached",
        "tail_ms",
        "unit_ms",
    )

    def __init__(self, latencies: Latencies) -> None:
        self.latencies = latencies
        self.accuracy = latencies.accuracy
        self.max_batch = latencies.max_batch
        self.overhead_ms = latencies.overhead_ms
        self.overhead_s = latencies.overhead_ms / MS
        sizes = range(1, latencies.max_batch + 1)
        self.p50_ms = [[row[rows - 1] for row in latencies.p50_ms] for rows in sizes]
        self.tail_ms = [[row[rows - 1] for row in latencies.tail_ms] for rows in sizes]
        self.best: list[int] = []
        for point, accuracy in enumerate(latencies.accuracy):
            last = self.best[-1] if self.best else 0
            self.best.append(point if accuracy > latencies.accuracy[last] else last)
        self.reached = [latencies.accuracy[point] for point in self.best]
        units = [min((row[rows - 1] / rows, -rows) for rows in sizes) for row in latencies.p50_ms]
        self.unit_ms = [unit_ms for unit_ms, _ in units]
        self.full_batch = [-rows for _, rows in units]
        uniform = [1 << k for k in range(self.full_batch[0].bit_length())]
        self.batch_sizes = sorted({*uniform, self.full_batch[0]})
        self.batches_ms = [latencies.p50_ms[0][rows - 1] for rows in self.batch_sizes]
        self.batch_tails_ms = [latencies.tail_ms[0][rows - 1] for rows in self.batch_sizes]
        self.prices = _prices(latencies.accuracy, self.unit_ms)
        self.drains_ms = [self._work_off_ms(rows) for rows in range(TABULATED + 1)]

    def drain_ms(self, rows: float) -> float:
        """Return how long one slot usually takes for so many rows at the cheapest point."""
        return self._work_off_ms(math.ceil(rows))

    def _work_off_ms(self, rows: int) -> float:
        full = self.full_batch[0]
        if rows == 0:
            return 0.0
        batches, rest = divmod(rows, full)
        last_ms = self.p50_ms[rest - 1][0] if rest else 0.0
        return batches * full * self.unit_ms[0] + last_ms


def _prices(accuracy: tuple[float, ...], unit_ms: list[float]) -> list[float]:
    """Return (P + 1,): the accuracy that a ms more for a row gains from each point upwards.

    The last is for a load that not even the cheapest point carries: a row served or not.
    """
    slopes = []
    for point, at_ms in enumerate(unit_ms):
        dearer = zip(accuracy[point + 1 :], unit_ms[point + 1 :], strict=True)
        gains = [(a - accuracy[point]) / (ms - at_ms) for a, ms in dearer if ms > at_ms]
        slopes.append(max(gains, default=0.0))
    return [*slopes, accuracy[0] / unit_ms[0]]
