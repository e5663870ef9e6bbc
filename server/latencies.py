"""What the selector knows of the points: accuracy, and latency per batch size. Pure data.

Made from a profile by the caller; measures nothing and knows no host.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

# A profile of some hundred runs knows its p99 and no more. The scheduler needs the latency that
# one run in ten thousand exceeds: with an exponential tail, (ln 1e4 - ln 2) / (ln 1e2 - ln 2)
# times as far above the median.
TAIL_REACH = 2.18

Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Latencies:
    """Points, cheapest first: accuracy (P,) in 0..1; p50_ms and tail_ms (P, max_batch).

    Both tables never fall with the batch size nor with the point; column b - 1 is batch size b.
    `overhead_ms` is what a request costs outside the engine.

    Raises:
        ValueError: a table has the wrong shape, falls, or holds something that is no time.
    """

    accuracy: tuple[float, ...]
    p50_ms: Table
    tail_ms: Table
    overhead_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.accuracy:
            raise ValueError("accuracy: at least one point is needed")
        for point, accuracy in enumerate(self.accuracy):
            if not 0 <= accuracy <= 1:
                raise ValueError(f"accuracy of point {point} is {accuracy}, not 0..1")
        if not (math.isfinite(self.overhead_ms) and self.overhead_ms >= 0):
            raise ValueError(f"overhead_ms is {self.overhead_ms}, not a time of at least 0")
        _check_table("p50_ms", self.p50_ms, len(self.accuracy))
        _check_table("tail_ms", self.tail_ms, len(self.accuracy))
        if self.max_batch != len(self.tail_ms[0]):
            raise ValueError(
                f"p50_ms has {self.max_batch} batch sizes, tail_ms {len(self.tail_ms[0])}"
            )
        for point, (p50, tail) in enumerate(zip(self.p50_ms, self.tail_ms, strict=True)):
            if any(t < p for p, t in zip(p50, tail, strict=True)):
                raise ValueError(f"tail_ms of point {point} is below its p50_ms")

    @property
    def max_batch(self) -> int:
        return len(self.p50_ms[0])

    @classmethod
    def from_quantiles(
        cls,
        accuracy: Sequence[float],
        batch_sizes: Sequence[int],
        p50_ms: Sequence[Sequence[float]],
        p99_ms: Sequence[Sequence[float]],
        overhead_ms: float = 0.0,
    ) -> "Latencies":
        """Return the tables for every batch size up to the largest of `batch_sizes`.

        p50_ms and p99_ms are (P, len(batch_sizes)), measured, and may be noisy: batch sizes in
        between are linear, and both tables are raised to where they don't fall.

        Raises:
            ValueError: as the class.
        """
        sizes = list(batch_sizes)
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1:
            raise ValueError(f"batch_sizes must rise from at least 1, not {sizes}")
        tail_ms = [
            [p50 + TAIL_REACH * max(0.0, p99 - p50) for p50, p99 in zip(*rows, strict=True)]
            for rows in zip(p50_ms, p99_ms, strict=True)
        ]
        p50 = _raised([_every_batch(sizes, row) for row in p50_ms])
        tail = _raised([_every_batch(sizes, row) for row in tail_ms])
        return cls(
            tuple(float(a) for a in accuracy),
            p50,
            tuple(tuple(map(max, *rows)) for rows in zip(tail, p50, strict=True)),  # to a rounding
            float(overhead_ms),
        )


def _check_table(name: str, table: Table, points: int) -> None:
    if len(table) != points:
        raise ValueError(f"{name} has {len(table)} points, accuracy {points}")
    width = len(table[0])
    for point, row in enumerate(table):
        if len(row) != width or not row:
            raise ValueError(f"{name} of point {point} has {len(row)} batch sizes, not {width}")
        if not all(math.isfinite(ms) and ms > 0 for ms in row):
            raise ValueError(f"{name} of point {point} must be times above 0")
        if any(b < a for a, b in pairwise(row)):
            raise ValueError(f"{name} of point {point} falls as the batch grows")
    for point, (low, high) in enumerate(pairwise(table)):
        if any(b < a for a, b in zip(low, high, strict=True)):
            raise ValueError(f"{name} of point {point + 1} is below that of point {point}")


def _every_batch(sizes: list[int], row: Sequence[float]) -> list[float]:
    """Return (max_batch,) ms; below the smallest profiled size, that size's."""
    if len(row) != len(sizes):
        raise ValueError(f"{len(row)} latencies for {len(sizes)} batch sizes")
    filled = []
    for batch in range(1, sizes[-1] + 1):
        right = bisect_left(sizes, batch)
        left = max(0, right - 1) if sizes[right] != batch else right
        span = sizes[right] - sizes[left]
        share = (batch - sizes[left]) / span if span and batch > sizes[left] else 0.0
        filled.append(float(row[left] + share * (row[right] - row[left])))
    return filled


def _raised(table: list[list[float]]) -> Table:
    """Return the least table above this one that never falls, by batch and by point."""
    rows = [list(accumulate(row, max)) for row in table]
    for low, high in pairwise(rows):
        high[:] = [max(a, b) for a, b in zip(low, high, strict=True)]
    return tuple(tuple(row) for row in rows)
