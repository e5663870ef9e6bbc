"""What is reported of a simulated run, and its interval over seeds."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulator.events import Outcome
from server.latencies import Latencies

# Student's t, two-sided 95 %, by degrees of freedom; normal beyond.
_T = (
    *(math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26),
    *(2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09),
    *(2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05),
)

Figures = dict[str, float]


def feasible(outcome: Outcome, latencies: Latencies) -> NDArray[np.bool_]:
    """Return (n,) bool: the fastest point alone usually makes the target."""
    least_ms = latencies.p50_ms[0][0] + latencies.overhead_ms
    return np.asarray(outcome.workload.targets_ms >= least_ms)


def figures(outcome: Outcome, latencies: Latencies) -> Figures:
    """Return the figures of one run: shares 0..1, times in ms.

    met, shed (not answered at all) and late are shares of all requests, met_feasible of those
    with feasible targets. accuracy: mean of what was met. value: the same with 0 for what
    wasn't. Latencies are of what was answered; NaN where nothing was.
    """
    met, answered = outcome.met, np.isfinite(outcome.latency_ms)
    can = feasible(outcome, latencies)
    found = {
        "met": float(met.mean()),
        "met_feasible": float(met[can].mean()) if can.any() else math.nan,
        "accuracy": float(outcome.accuracy[met].mean()) if met.any() else math.nan,
        "value": float(outcome.accuracy[met].sum()) / len(met),
        "shed": float(1 - answered.mean()),
        "late": float((answered & ~met).mean()),
        "rows": float(np.mean(outcome.batch_rows)) if outcome.batch_rows else math.nan,
    }
    served_ms = outcome.latency_ms[answered]
    for name, quantile in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("p99.9", 0.999)):
        found[f"{name}_ms"] = (
            float(np.quantile(served_ms, quantile)) if len(served_ms) else math.nan
        )
    if outcome.decision_us:
        found["decision_p50_us"] = float(np.quantile(outcome.decision_us, 0.5))
        found["decision_p99_us"] = float(np.quantile(outcome.decision_us, 0.99))
    return found


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float] | None]:
    """Return (mean, half of the 95 % interval) of each figure; None where a run lacks it.

    With one run the half is 0: nothing is known of it.
    """
    return {name: _interval([run[name] for run in runs]) for name in runs[0]}


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    if not all(math.isfinite(value) for value in values):
        return None
    if len(values) == 1:
        return values[0], 0.0
    t = _T[len(values) - 1] if len(values) <= len(_T) else 1.96
    return mean(values), t * stdev(values) / math.sqrt(len(values))
