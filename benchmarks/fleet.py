"""`maestro bench fleet`: how many replicas a load needs, simulated behind a balancer.

Each request goes to the replica with the fewest waiting. Beside our policy, servers of one fixed
point: what the same load would need without points to choose from.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import arguments, report
from benchmarks.policies import read_quantiles
from benchmarks.simulator import workloads
from benchmarks.simulator.events import Replica, simulate
from benchmarks.simulator.figures import Figures, figures, over_seeds
from benchmarks.simulator.host import Host, Quantiles
from benchmarks.simulator.rivals import RIVALS
from benchmarks.simulator.scenarios import ARRIVALS, MAX_QUEUE, Scenario
from benchmarks.simulator.workloads import Workload
from server.scheduler import Scheduler
from server.tables import Tables

POLICIES = ("ours", "largest", "smallest")

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate fleets of 1 to `--replicas`, print the result, write it where `--out` says."""
    parser = argparse.ArgumentParser(prog="maestro bench fleet", description=__doc__)
    parser.add_argument(
        "artifact", type=Path, nargs="?", help="ResNet-18 of random weights if none"
    )
    parser.add_argument("--profile", type=Path, help="a profile.json, not measured again")
    parser.add_argument(
        "--rps", type=arguments.positive, required=True, help="requests a second, of all"
    )
    parser.add_argument("--target-ms", type=arguments.positive, required=True)
    parser.add_argument("--met", type=float, default=0.999, help="share of targets to meet")
    parser.add_argument("--accuracy", type=float, default=0.0, help="mean to reach, 0..1")
    parser.add_argument("--arrivals", choices=ARRIVALS, default="gamma4")
    parser.add_argument("--trace", type=Path, help="a time in seconds a line, scaled to --rps")
    parser.add_argument("--replicas", type=int, default=8, help="at most so many are tried")
    parser.add_argument("--requests", type=int, default=5000, help="of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(argv)
    if chosen.requests < 100 or chosen.seeds < 1 or chosen.replicas < 1:
        raise ValueError("--requests must be at least 100, --seeds and --replicas at least 1")
    quantiles, source = read_quantiles(chosen.artifact, chosen.profile)
    arrivals = "trace" if chosen.trace else chosen.arrivals
    drawn = [
        workload(
            quantiles, arrivals, chosen.rps, chosen.target_ms, chosen.requests, seed, chosen.trace
        )
        for seed in range(chosen.seeds)
    ]
    rows = compared(quantiles, drawn, range(1, chosen.replicas + 1))
    result = {
        **report.conditions(),
        "source": source,
        "arrivals": arrivals,
        "rps": chosen.rps,
        "target_ms": chosen.target_ms,
        "requests": chosen.requests,
        "seeds": chosen.seeds,
        "asked": {"met": chosen.met, "accuracy": chosen.accuracy},
        "needed": {name: needed(rows, name, chosen.met, chosen.accuracy) for name in POLICIES},
        "rows": rows,
    }
    report.write(result, chosen.out)


def workload(
    quantiles: Quantiles,
    arrivals: str,
    rps: float,
    target_ms: float,
    requests: int,
    seed: int,
    trace: Path | None = None,
) -> Workload:
    """Return requests at a mean rate, all with one target.

    Raises:
        ValueError: as `Scenario.workload`.
    """
    latencies = quantiles.latencies()
    one_carries_rps = 1e3 / Tables(latencies).unit_ms[-1]
    drawn = Scenario(arrivals, rps / one_carries_rps).workload(latencies, requests, seed, trace)
    return replace(drawn, targets_ms=workloads.one_target(target_ms, requests))


def compared(quantiles: Quantiles, drawn: Sequence[Workload], sizes: Sequence[int]) -> list[Row]:
    """Return a row per policy and size of the fleet: figures over the workloads, one a seed."""
    cases = list(product(POLICIES, sizes))
    return [
        {
            "policy": policy,
            "replicas": size,
            **over_seeds([_one(quantiles, policy, size, w, i) for i, w in enumerate(drawn)]),
        }
        for policy, size in track(cases, "fleet", console=Console(stderr=True), transient=True)
    ]


def _one(quantiles: Quantiles, policy: str, size: int, drawn: Workload, seed: int) -> Figures:
    latencies = quantiles.latencies()
    fleet = [
        Replica(
            _scheduler(quantiles, policy),
            Host(quantiles, np.random.default_rng((seed, at))),
            latencies,
        )
        for at in range(size)
    ]
    return figures(simulate(drawn, fleet), latencies)


def _scheduler(quantiles: Quantiles, policy: str) -> Scheduler:
    latencies = quantiles.latencies()
    if policy == "ours":
        return Scheduler(latencies, max_queue=MAX_QUEUE, preempts=True)
    rival = RIVALS[policy](Tables(latencies), 0)
    return Scheduler(latencies, policy=rival, max_queue=MAX_QUEUE, sheds=False)


def needed(rows: Sequence[Row], policy: str, met: float, accuracy: float) -> int | None:
    """Return the fewest replicas that reach both, in the mean over seeds; None if none tried do."""
    enough = [
        row["replicas"]
        for row in rows
        if row["policy"] == policy
        and row["met"][0] >= met
        and row["accuracy"]
        and row["accuracy"][0] >= accuracy
    ]
    return min(enough, default=None)


if __name__ == "__main__":
    main()
