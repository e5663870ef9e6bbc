"""The runs that claims rest on: long, near the optimum, on a slowed host, far too much load."""

import math
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulator import scenarios, workloads
from benchmarks.simulator.bound import best_value
from benchmarks.simulator.events import Clock, Outcome
from benchmarks.simulator.figures import Figures, feasible, figures
from benchmarks.simulator.host import Quantiles, SlowSpell
from benchmarks.simulator.scenarios import Scenario
from benchmarks.simulator.workloads import Workload
from server.latencies import Latencies
from server.requests import Request
from server.scheduler import Scheduler
from server.selector import choose
from server.tables import Tables

SLOWER = 1.5
RECOVERY_S = 1.0
OVERLOAD = 3.0
SMALL = 60
# Targets of the decision timing, over the time to drain its queue: with the first all can be met.
LOOSE = 4.0
TIGHT = 1.0


@dataclass(frozen=True, slots=True)
class Served:
    """A host, and what receiving and answering a request take of its core (`events.Replica`)."""

    quantiles: Quantiles
    request_ms: float = 0.0

    def run(self, workload: Workload, seed: int, spell: SlowSpell | None = None) -> Outcome:
        """Return what becomes of a workload with our policy."""
        return scenarios.run(
            self.quantiles, workload, choose, seed, spell=spell, request_ms=self.request_ms
        )


def steady(host: Served, requests: int, clock: Clock, seed: int = 0) -> Figures:
    """Return the figures of one long Poisson run at the load that the largest point carries, and
    how many requests a second were simulated by the clock."""
    latencies = host.quantiles.latencies()
    workload = Scenario("poisson", 1.0).workload(latencies, requests, seed)
    began_s = clock()
    outcome = host.run(workload, seed)
    found = figures(outcome, latencies)
    missed = float((~outcome.met).sum())
    return {**found, "missed": missed, "simulated_rps": requests / (clock() - began_s)}


def near_bound(quantiles: Quantiles, cv2: float, load: float, seed: int) -> Figures:
    """Return the value of our schedule and of the best one, for few requests on a steady host."""
    still = _steady_host(quantiles)
    latencies = still.latencies()
    workload = _gamma(latencies, cv2, load, SMALL, seed)
    ours = figures(scenarios.run(still, workload, choose, seed), latencies)["value"]
    best = best_value(workload, latencies)
    return {"ours": ours, "best": best, "gap": best - ours}


def slowed(host: Served, scenario: Scenario, requests: int, seed: int) -> Figures:
    """Return the share of feasible targets met when the host slows down for the middle third.

    Of requests that came before it; during it, from a second after its start; and after it. NaN
    where none came.
    """
    latencies = host.quantiles.latencies()
    workload = scenario.workload(latencies, requests, seed)
    end_s = float(workload.arrivals_s[-1])
    spell = SlowSpell(end_s / 3, 2 * end_s / 3, SLOWER)
    outcome = host.run(workload, seed, spell)
    came_s = workload.arrivals_s
    spans = {
        "before": came_s < spell.start_s,
        "first_second": (came_s >= spell.start_s) & (came_s < spell.start_s + RECOVERY_S),
        "during": (came_s >= spell.start_s + RECOVERY_S) & (came_s < spell.end_s),
        "after": came_s >= spell.end_s,
    }
    can = feasible(outcome, latencies)
    return {name: _share(outcome.met[span & can]) for name, span in spans.items()}


def overloaded(host: Served, cv2: float, requests: int, seed: int) -> Figures:
    """Return goodput over the smallest point's capacity, at OVERLOAD times that load, and the
    share of what is answered that is on time."""
    latencies = host.quantiles.latencies()
    tables = Tables(latencies)
    load = OVERLOAD * tables.unit_ms[-1] / tables.unit_ms[0]
    workload = _gamma(latencies, cv2, load, requests, seed)
    outcome = host.run(workload, seed)
    span_s = _served_s(outcome)
    answered = np.isfinite(outcome.latency_ms)
    return {
        "goodput": float(outcome.met.sum()) / span_s * tables.unit_ms[0] / 1e3,
        "on_time": float(outcome.met[answered].mean()),
    }


def decision_us(
    points: int, waiting: int, decisions: int, clock: Clock, loose: float = LOOSE, seed: int = 0
) -> Figures:
    """Return quantiles of the time of `plan` and `submit` by the clock, with mixed targets.

    busy: of `plan` while a batch runs, which may be interrupted.
    waiting: requests in the queue, or as many as fit in time. loose: the least target, over the
    time to drain such a queue; the largest is twice that.
    """
    rng = np.random.default_rng(seed)
    latencies = _geometric(points)
    drain_s = Tables(latencies).drain_ms(waiting) / 1e3
    scheduler = Scheduler(latencies, max_queue=2 * waiting, preempts=True)
    now, numbers = 0.0, count()
    took_us: list[float] = []
    busy_us: list[float] = []
    submit_us: list[float] = []
    waited: list[int] = []
    while len(took_us) < decisions:
        for _ in range(waiting):
            if scheduler.waiting >= waiting:
                break
            target_s = drain_s * float(rng.uniform(loose, 2 * loose))
            request = Request(str(next(numbers)), now, now + target_s)
            began_s = clock()
            scheduler.submit(request, now)
            submit_us.append(1e6 * (clock() - began_s))
        waited.append(scheduler.waiting)
        began_s = clock()
        batch = scheduler.plan(now).batch
        took_us.append(1e6 * (clock() - began_s))
        if batch is None:
            raise RuntimeError(f"nothing was planned with {waiting} requests waiting")
        began_s = clock()
        scheduler.plan(now)
        busy_us.append(1e6 * (clock() - began_s))
        took_ms = latencies.p50_ms[batch.point][batch.rows - 1]
        now += took_ms / 1e3
        scheduler.done(batch.id, took_ms, now)
    p50, p99 = np.quantile(took_us, (0.5, 0.99)).tolist()
    busy_p50, busy_p99 = np.quantile(busy_us, (0.5, 0.99)).tolist()
    submit_p50, submit_p99 = np.quantile(submit_us, (0.5, 0.99)).tolist()
    return {
        "waiting": float(np.median(waited)),
        "points": float(points),
        "loose": loose,
        "p50_us": p50,
        "p99_us": p99,
        "busy_p50_us": busy_p50,
        "busy_p99_us": busy_p99,
        "submit_p50_us": submit_p50,
        "submit_p99_us": submit_p99,
    }


def _steady_host(quantiles: Quantiles) -> Quantiles:
    """Return a host whose every run takes the median."""
    p50_ms = quantiles.p50_ms
    return replace(quantiles, p90_ms=p50_ms, p95_ms=p50_ms, p99_ms=p50_ms)


def _gamma(latencies: Latencies, cv2: float, load: float, requests: int, seed: int) -> Workload:
    rng = np.random.default_rng((seed, round(cv2)))
    rate = Scenario("poisson", load).rate(Tables(latencies))
    target_ms = scenarios.TARGET * latencies.p50_ms[-1][0] + latencies.overhead_ms
    arrivals_s = workloads.gamma(rate, cv2, requests, rng)
    return Workload(f"gamma{cv2:g}", arrivals_s, workloads.one_target(target_ms, requests))


def _share(met: NDArray[np.bool_]) -> float:
    return float(met.mean()) if len(met) else math.nan


def _served_s(outcome: Outcome) -> float:
    """Return from the first arrival to the last answer."""
    ends_s = outcome.workload.arrivals_s + outcome.latency_ms / 1e3
    return float(np.nanmax(ends_s) - outcome.workload.arrivals_s[0])


def _geometric(points: int, max_batch: int = 16) -> Latencies:
    """Return points from 1 to 12 ms; half of that for each further row."""
    single_ms = np.geomspace(1.0, 12.0, points)
    p50_ms = np.outer(single_ms, (1 + np.arange(1, max_batch + 1)) / 2)
    tail_ms = 1.2 * p50_ms
    accuracy = np.linspace(0.7, 0.8, points).tolist()
    return Latencies(tuple(accuracy), _table(p50_ms), _table(tail_ms))


def _table(values: workloads.Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in values.tolist())
