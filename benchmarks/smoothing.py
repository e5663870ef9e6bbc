"""Makes measured latencies monotone, and finds the points that a host gives no reason to use."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from maestro_core.profile import Latency

Floats = npt.NDArray[np.float64]

_QUANTILES = ("p50_ms", "p90_ms", "p95_ms", "p99_ms")
_DYKSTRA_ROUNDS = 100


class Smoothed(NamedTuple):
    """Latencies that never fall with batch, nor along the points that are not dominated."""

    latencies: tuple[Latency, ...]
    dominated: tuple[int, ...]


def smooth(latencies: Sequence[Latency], accuracy: Sequence[float]) -> Smoothed:
    """Fit monotone latencies to a complete grid, given by point (cheapest first), then batch.

    A point is dominated when a dearer one is no slower at any batch size and no less accurate: it
    is left out of the chain, so that it does not pull its better up, and only made monotone in
    batch. Logarithms are fitted: noise is relative. The same fit at every quantile keeps
    p50 <= p90 <= p95 <= p99. `accuracy` is of each point.
    """
    points = sorted({latency.point for latency in latencies})
    tables = _tables(latencies, len(points))
    in_batch = {name: np.apply_along_axis(isotonic, 1, table) for name, table in tables.items()}
    dominated = dominated_rows(in_batch["p50_ms"], accuracy)
    chain = [row for row in range(len(points)) if row not in dominated]
    for table in in_batch.values():
        table[chain] = isotonic_grid(table[chain])
    fitted = {name: np.exp(table).ravel() for name, table in in_batch.items()}
    smoothed = tuple(
        _refit(latency, [float(fitted[name][i]) for name in _QUANTILES])
        for i, latency in enumerate(latencies)
    )
    return Smoothed(smoothed, tuple(points[row] for row in dominated))


def isotonic(y: Floats) -> Floats:
    """Return the never-falling sequence nearest to y, (n,), in least squares.

    Pool adjacent violators (Ayer et al., 1955).
    """
    pools: list[tuple[float, int]] = []  # mean, size
    for value in y:
        mean, size = float(value), 1
        while pools and pools[-1][0] > mean:
            other, n = pools.pop()
            mean, size = (other * n + mean * size) / (n + size), n + size
        pools.append((mean, size))
    means, sizes = zip(*pools, strict=True)
    return np.repeat(np.array(means, dtype=float), sizes)


def isotonic_grid(table: Floats) -> Floats:
    """Return the table nearest to (points, batches) that falls along neither axis.

    Dykstra's alternating projections (1983), ended by a running maximum that makes it exact.
    """
    fit, in_batch, in_chain = table, np.zeros_like(table), np.zeros_like(table)
    for _ in range(_DYKSTRA_ROUNDS):
        rows = np.apply_along_axis(isotonic, 1, fit + in_batch)
        in_batch = fit + in_batch - rows
        columns = np.apply_along_axis(isotonic, 0, rows + in_chain)
        in_chain = rows + in_chain - columns
        fit, before = columns, fit
        if np.allclose(fit, before, rtol=0, atol=1e-9):
            break
    return np.maximum.accumulate(np.maximum.accumulate(fit, axis=0), axis=1)


def dominated_rows(table: Floats, accuracy: Sequence[float]) -> tuple[int, ...]:
    """Return the rows of (points, batches) that a later row, no less accurate, matches or beats in
    every column."""
    as_accurate = np.greater_equal.outer(np.asarray(accuracy), np.asarray(accuracy))
    return tuple(
        row
        for row in range(len(table))
        if ((table[row + 1 :] <= table[row]).all(axis=1) & as_accurate[row + 1 :, row]).any()
    )


def _tables(latencies: Sequence[Latency], points: int) -> dict[str, Floats]:
    return {
        name: np.log([getattr(latency, name) for latency in latencies]).reshape(points, -1)
        for name in _QUANTILES
    }


def _refit(latency: Latency, quantiles: Sequence[float]) -> Latency:
    p50, p90, p95, p99 = np.maximum.accumulate(quantiles).tolist()
    return replace(
        latency,
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        p50_low_ms=min(p50, latency.p50_low_ms),
        p50_high_ms=max(p50, latency.p50_high_ms),
    )
