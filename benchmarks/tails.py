"""Tails from few runs: what a cell's own runs say of its tail, with what those like it say."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from maestro_core.profile import Latency

Floats = npt.NDArray[np.float64]

_QUANTILES = (0.9, 0.95, 0.99)
_ALIKE = 3.0  # medians within this factor: interruptions last as long, whatever they interrupt
_PRIOR_RUNS = 100  # the others' tail counts as much as so many runs of one's own


def steadied(latencies: Sequence[Latency], runs_ms: Sequence[Floats]) -> list[Latency]:
    """Return latencies whose p90, p95 and p99 lean on those of cells with a like median.

    A p99 of twenty runs is the slowest of them: luck. Interruptions by the system strike all
    points alike, so ratios to the median are pooled, and a cell's own count by its runs
    (shrinkage in logarithms, which keeps the quantiles in order).
    """
    medians = np.array([latency.p50_ms for latency in latencies])
    ratios = [runs / median for runs, median in zip(runs_ms, medians, strict=True)]
    return [_steadied(latency, i, medians, ratios) for i, latency in enumerate(latencies)]


def _steadied(latency: Latency, i: int, medians: Floats, ratios: Sequence[Floats]) -> Latency:
    alike = np.flatnonzero(np.abs(np.log(medians / medians[i])) <= np.log(_ALIKE))
    pooled = np.quantile(np.concatenate([ratios[j] for j in alike.tolist()]), _QUANTILES)
    own = np.quantile(ratios[i], _QUANTILES)
    n = len(ratios[i])
    logs = (n * np.log(own) + _PRIOR_RUNS * np.log(pooled)) / (n + _PRIOR_RUNS)
    p90, p95, p99 = (latency.p50_ms * np.maximum(1.0, np.exp(logs))).tolist()
    return replace(latency, p90_ms=p90, p95_ms=p95, p99_ms=p99)
