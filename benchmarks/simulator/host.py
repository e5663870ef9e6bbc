"""A simulated host: how long a batch takes, drawn from a profile with its spread."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from maestro_core.profile import Profile
from server.latencies import Latencies

LEVELS = (0.0, 0.5, 0.9, 0.95, 0.99)
DRAWS = 1 << 16


@dataclass(frozen=True, slots=True)
class Quantiles:
    """accuracy (P,) and the p50, p90, p95 and p99 of each point and batch size, (P, B), in ms."""

    accuracy: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    p50_ms: Sequence[Sequence[float]]
    p90_ms: Sequence[Sequence[float]]
    p95_ms: Sequence[Sequence[float]]
    p99_ms: Sequence[Sequence[float]]
    overhead_ms: float = 0.0

    @classmethod
    def from_profile(cls, profile: Profile, accuracy: Sequence[float]) -> "Quantiles":
        """Return the quantiles of the points that are not dominated on the profile's host.

        Raises:
            ValueError: `accuracy` doesn't have one value per point.
        """
        if len(accuracy) != len(profile.points):
            raise ValueError(f"{len(accuracy)} accuracies for {len(profile.points)} points")
        kept = [point for point in profile.points if point not in profile.dominated]
        rows = [profile.row(point) for point in kept]
        return cls(
            tuple(accuracy[point] for point in kept),
            profile.batch_sizes,
            [[cell.p50_ms for cell in row] for row in rows],
            [[cell.p90_ms for cell in row] for row in rows],
            [[cell.p95_ms for cell in row] for row in rows],
            [[cell.p99_ms for cell in row] for row in rows],
            profile.overhead_ms,
        )

    def latencies(self) -> Latencies:
        """Return what the scheduler gets to know."""
        return Latencies.from_quantiles(
            self.accuracy, self.batch_sizes, self.p50_ms, self.p99_ms, self.overhead_ms
        )


@dataclass(frozen=True, slots=True)
class SlowSpell:
    """The host takes `factor` times as long from `start_s` to `end_s`."""

    start_s: float
    end_s: float
    factor: float


class Host:
    """Draws engine times. Below p50 the spread mirrors the one above; beyond p99 it is exponential
    with the scale that p95 and p99 show."""

    def __init__(
        self, quantiles: Quantiles, rng: np.random.Generator, spell: SlowSpell | None = None
    ) -> None:
        self._spell = spell
        self._rng = rng
        self._uniform: list[float] = []
        tables = [
            Latencies.from_quantiles(quantiles.accuracy, quantiles.batch_sizes, table, table).p50_ms
            for table in (quantiles.p50_ms, quantiles.p90_ms, quantiles.p95_ms, quantiles.p99_ms)
        ]
        self._knots = [
            [_knots(*cell) for cell in zip(*rows, strict=True)]
            for rows in zip(*tables, strict=True)
        ]

    def draw_ms(self, point: int, rows: int, now: float) -> float:
        """Return how long a batch that starts now takes."""
        if not self._uniform:
            self._uniform = self._rng.random(DRAWS).tolist()
        u = self._uniform.pop()
        knots = self._knots[point][rows - 1]
        right = bisect_right(LEVELS, u)
        if right < len(LEVELS):
            share = (u - LEVELS[right - 1]) / (LEVELS[right] - LEVELS[right - 1])
            drawn_ms = knots[right - 1] + share * (knots[right] - knots[right - 1])
        else:
            drawn_ms = knots[4] + _scale_ms(knots) * math.log(0.01 / (1 - u))
        return float(drawn_ms * self._slow(now))

    def _slow(self, now: float) -> float:
        spell = self._spell
        return spell.factor if spell is not None and spell.start_s <= now < spell.end_s else 1.0


def mean_ms(p50_ms: float, p90_ms: float, p95_ms: float, p99_ms: float) -> float:
    """Return the mean of what a `Host` with these quantiles draws."""
    knots = _knots(p50_ms, p90_ms, p95_ms, p99_ms)
    parts = zip(pairwise(LEVELS), pairwise(knots), strict=True)
    below_ms = sum((to - since) * (low + high) / 2 for (since, to), (low, high) in parts)
    return below_ms + (1 - LEVELS[-1]) * (knots[-1] + _scale_ms(knots))


def _knots(p50_ms: float, p90_ms: float, p95_ms: float, p99_ms: float) -> tuple[float, ...]:
    """Return the quantiles at LEVELS."""
    return 2 * p50_ms - min(p90_ms, 1.1 * p50_ms), p50_ms, p90_ms, p95_ms, p99_ms


def _scale_ms(knots: Sequence[float]) -> float:
    """Return the scale of the exponential beyond p99."""
    return (knots[4] - knots[3]) / math.log(5)
