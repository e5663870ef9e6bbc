"""Latencies laid out for look-up by the selector. Pure data, made once per profile."""

import math

from server.latencies import Latencies

MS = 1e3
# Rows up to which the time to work off a queue is tabulated.
TABULATED = 2048


class Tables:
    """`p50_ms` and `tail_ms` are columns: [rows - 1][point], rising along the points.

    best[p]: the most accurate of points 0..p. unit_ms[p]: a row's share of the batch size that
    gets most rows a second through, full_batch[p].
    """

    __slots__ = ("_drain_ms", "best", "full_batch", "latencies", "p50_ms", "tail_ms", "unit_ms")

    def __init__(self, latencies: Latencies) -> None:
        self.latencies = latencies
        sizes = range(1, latencies.max_batch + 1)
        self.p50_ms = [[row[rows - 1] for row in latencies.p50_ms] for rows in sizes]
        self.tail_ms = [[row[rows - 1] for row in latencies.tail_ms] for rows in sizes]
        self.best: list[int] = []
        for point, accuracy in enumerate(latencies.accuracy):
            last = self.best[-1] if self.best else 0
            self.best.append(point if accuracy > latencies.accuracy[last] else last)
        units = [min((row[rows - 1] / rows, -rows) for rows in sizes) for row in latencies.p50_ms]
        self.unit_ms = [unit_ms for unit_ms, _ in units]
        self.full_batch = [-rows for _, rows in units]
        self._drain_ms = [self._work_off_ms(rows) for rows in range(TABULATED)]

    def drain_ms(self, rows: float) -> float:
        """Return how long one slot usually takes for so many rows at the cheapest point.

        More than a full batch counts in full batches: who stands in the middle of one is done
        when it is.
        """
        whole = math.ceil(rows)
        return self._drain_ms[whole] if whole < TABULATED else self._work_off_ms(whole)

    def _work_off_ms(self, rows: int) -> float:
        full = self.full_batch[0]
        if rows == 0:
            return 0.0
        if rows < full:
            return self.p50_ms[rows - 1][0]
        return math.ceil(rows / full) * full * self.unit_ms[0]
