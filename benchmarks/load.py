"""`maestro bench load`: policies on live servers, over HTTP, beside what the simulator says.

A server of each policy runs in a process of its own, kept from the core that sends, and is started
anew for each load: it remembers bursts. All answer the same requests, one server at a time, in
random order in each round. Latency counts from when a request should have been sent. The simulator
draws from the profile that the servers use, and is told when each request really went out, and what
serving took of the cores (`benchmarks.demand`) in the very run that it is set beside: the host's
speed changes within minutes. What of that is for a request and what for a batch, all runs of a load
tell together. Beside it stands what it says by what was measured before, at the same load and with
other requests; without the event loop; and by the profile as it was. Rows whose requests went out
too late to be that load say so.
"""

import argparse
import asyncio
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from benchmarks import arguments, report
from benchmarks.demand import Demand, Taken, demand, lost
from benchmarks.open_loop import Sent, send_all
from benchmarks.own_server import Server, cores_apart, npy_sample, profiled, server
from benchmarks.simulator import scenarios, workloads
from benchmarks.simulator.events import Outcome
from benchmarks.simulator.figures import Figures, figures, over_seeds
from benchmarks.simulator.host import Quantiles, SlowSpell, mean_ms
from benchmarks.simulator.rivals import RIVALS
from benchmarks.simulator.scenarios import ARRIVALS, Scenario
from benchmarks.simulator.workloads import Array, Workload
from maestro_core import artifact
from maestro_core.host import Elsewhere
from maestro_core.profile import Profile
from server.policies import OWN
from server.policy_names import PolicyName
from server.settings import shipped_artifact
from server.tables import Tables

POLICIES = (*OWN, "largest", "smallest", "slackfit", "infaas")
# Lone requests: so many. They warm a server up and tell what the way there and back takes.
LONE, APART_S = 100, 0.02
# A run is in parts of so many requests or more: some have large batches, and others small ones.
PART = 20
# Seed of the requests by which is measured beforehand what serving takes.
BEFOREHAND = 10**6
AGREE = 0.02  # of targets met, live and simulated
# The sender kept up where all but a hundredth were sent within so much of their target.
KEPT_UP = 0.1

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print the result, write it and its plot where `--out` says."""
    parser = argparse.ArgumentParser(prog="maestro bench load", description=__doc__)
    parser.add_argument("artifact", type=Path, nargs="?", default=shipped_artifact())
    parser.add_argument(
        "--policies", nargs="+", choices=get_args(PolicyName), default=list(POLICIES)
    )
    parser.add_argument("--arrivals", nargs="+", choices=ARRIVALS, default=["poisson", "gamma4"])
    parser.add_argument("--loads", nargs="+", type=arguments.positive, default=[0.6, 1.5])
    parser.add_argument("--trace", type=Path, help="arrivals to replay, a time in seconds a line")
    parser.add_argument("--requests", type=int, default=1000, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="300 requests, one round, a quick profile"
    )
    parser.add_argument("--out", type=Path, help="else results/load.json, but for --quick")
    chosen = parser.parse_args(argv)
    if chosen.quick:
        chosen.requests, chosen.rounds = 300, 1
    if chosen.requests < 100 or chosen.rounds < 1:
        raise ValueError("--requests must be at least 100, --rounds at least 1")
    if chosen.trace:
        workloads.replay(chosen.trace, 1.0, 1, np.random.default_rng(0))  # refused before the work
    elif "trace" in chosen.arrivals:
        raise ValueError("--arrivals trace: --trace says which file")
    arrivals = [*chosen.arrivals, *(["trace"] if chosen.trace else [])]
    cases = [Scenario(*case) for case in product(dict.fromkeys(arrivals), chosen.loads)]
    model = artifact.load(chosen.artifact)
    elsewhere = Elsewhere()
    with cores_apart() as (sending, cores), ExitStack() as stack:
        serving = {min(cores)}  # event loop and computing share it, as the simulator has it
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        profile = profiled(model, folder, serving, quick=chosen.quick)
        accuracy = [point.score.value for point in model.manifest.points]
        quantiles = Quantiles.from_profile(profile, accuracy)
        body = npy_sample(model)
        rows: list[Row] = []
        for case in track(cases, "load", console=Console(stderr=True), transient=True):
            with ExitStack() as started:
                servers = {
                    policy: started.enter_context(server(model, folder, policy, serving))
                    for policy in chosen.policies
                }
                bench = Bench(body, profile, quantiles, servers, chosen.requests, chosen.trace)
                rows += bench.compared(case, chosen.rounds)
    result = {
        **report.conditions(),
        "model": model.manifest.name,
        "cores": {"sending": sorted(sending), "serving": sorted(serving)},
        "cores_used_by_others_and_us": elsewhere.share(),
        "requests": chosen.requests,
        "rounds": chosen.rounds,
        "overhead_ms": profile.overhead_ms,
        "agree_within": AGREE,
        "kept_up_within": KEPT_UP,
        "agreeing": sum(abs(row["difference"][0]) <= AGREE for row in rows),
        "rows": rows,
        "quantiles": asdict(quantiles),
    }
    out = report.place("load.json", chosen.out, quick=chosen.quick)
    report.write(result, out)
    if out:
        picture(rows).savefig(out.with_suffix(".png"), dpi=110)


@dataclass(frozen=True, slots=True)
class Live:
    """What became of a workload, what serving each part of it took, the share of computing that was
    for batches that were interrupted, and by how many ms each request went out late."""

    figures: Figures
    parts: list[Taken]
    lost: float
    late_ms: Array

    def demand(self, alike: Sequence[Taken]) -> Demand:
        """Return what serving took, by parts of this run and of others."""
        return demand(self.parts, alike, self.lost)


class Bench:
    """Live servers by policy, and the simulator of the host that they run on.

    way_ms: what a request takes beyond what the server counts; clients ask for that much less.
    """

    def __init__(
        self,
        body: bytes,
        profile: Profile,
        quantiles: Quantiles,
        servers: Mapping[str, Server],
        requests: int,
        trace: Path | None,
    ) -> None:
        self._quantiles = quantiles
        self._latencies = quantiles.latencies()
        self._profile = profile
        self._servers = servers
        self._requests = requests
        self._trace = trace
        self._body = body
        self.way_ms = median(self._way_ms(server) for server in servers.values())

    def compared(self, case: Scenario, rounds: int) -> list[Row]:
        """Return a row per policy: live and simulated figures over the rounds."""
        before = {policy: self._live(case, policy, BEFOREHAND) for policy in self._servers}
        runs: list[tuple[str, int, Live]] = []
        for seed in range(rounds):
            order = list(self._servers)
            random.Random(f"{seed}/{case.name}").shuffle(order)
            runs += [(policy, seed, self._live(case, policy, seed)) for policy in order]
        parts = [part for _, _, run in runs for part in run.parts]
        parts_before = [part for run in before.values() for part in run.parts]
        live: dict[str, list[Figures]] = {}
        simulated: dict[str, dict[str, list[Figures]]] = {}
        for policy, seed, run in runs:
            meanwhile = run.demand(parts)
            found = {**run.figures, **asdict(meanwhile), "lost": run.lost}
            live.setdefault(policy, []).append(found)
            told = {
                "simulated": meanwhile,
                "beforehand": before[policy].demand(parts_before),
                "without_loop": replace(meanwhile, request_ms=0.0, batch_ms=0.0),
                "as_profiled": replace(meanwhile, slower=1.0),
            }
            own = simulated.setdefault(policy, {})
            for name, demanded in told.items():
                said = self._simulated(case, policy, seed, demanded, run.late_ms)
                own.setdefault(name, []).append(said)
        return [
            {
                "arrivals": case.arrivals,
                "load": case.load,
                "policy": policy,
                "way_ms": self.way_ms,
                "live": over_seeds(live[policy]),
                "simulated": over_seeds(own["simulated"]),
                "difference": _difference(live[policy], own["simulated"], "met"),
                **{
                    f"difference_{name}": _difference(live[policy], own[name], "met")
                    for name in ("beforehand", "without_loop", "as_profiled")
                },
                "accuracy_difference": _difference(live[policy], own["simulated"], "accuracy"),
                "kept_up": _mean(live[policy], "sent_late_of_target") <= KEPT_UP,
            }
            for policy, own in simulated.items()
        ]

    def _way_ms(self, server: Server) -> float:
        """Return the median of what a lone request takes beyond what the server counts, in ms."""
        arrivals_s = [i * APART_S for i in range(LONE)]
        sent = self._send(server.address, arrivals_s, [1e4] * LONE)
        return median(one.latency_ms - one.server_ms for one in sent if one.status == 200)

    def _send(
        self,
        address: str,
        arrivals_s: Sequence[float],
        targets_ms: Sequence[float],
        resting: Callable[[int], None] = lambda _sent: None,
    ) -> list[Sent]:
        sending = send_all(
            f"{address}/infer", self._body, "application/x-npy", arrivals_s, targets_ms, resting
        )
        return asyncio.run(sending)

    def _sent(self, server: Server, workload: Workload) -> tuple[list[Sent], list[Taken]]:
        """Return what became of a workload, and what serving each part of it took."""
        marks = [(0, server.core_time())]

        def mark(sent: int) -> None:
            if sent - marks[-1][0] >= PART:
                marks.append((sent, server.core_time()))

        arrivals_s, targets_ms = workload.arrivals_s.tolist(), workload.targets_ms.tolist()
        sent = self._send(server.address, arrivals_s, targets_ms, mark)
        marks.append((len(sent), server.core_time()))
        parts = [
            Taken.of(sent[i:j], until - since, self._mean_ms)
            for (i, since), (j, until) in pairwise(marks)
        ]
        return sent, parts

    def _mean_ms(self, point: int, rows: int) -> float:
        return mean_ms(*(self._profile.quantile_ms(point, rows, q) for q in (50, 90, 95, 99)))

    def _live(self, case: Scenario, policy: str, seed: int) -> Live:
        workload = case.workload(self._latencies, self._requests, seed, self._trace)
        server = self._servers[policy]
        lost_before_s = server.interrupted_s()
        sent, parts = self._sent(server, workload)
        interrupted_ms = 1e3 * (server.interrupted_s() - lost_before_s)
        outcome = Outcome(
            replace(workload, targets_ms=workload.targets_ms + self.way_ms),
            np.array([one.latency_ms for one in sent]),
            np.array([one.accuracy for one in sent]),
        )
        late_ms = np.array([one.late_ms for one in sent])
        found = {
            **figures(outcome, self._latencies),
            "sent_late_p50_ms": float(np.quantile(late_ms, 0.5)),
            "sent_late_p99_ms": float(np.quantile(late_ms, 0.99)),
            "sent_late_of_target": float(np.quantile(late_ms / workload.targets_ms, 0.99)),
            "batch": _mean_batch(sent),
        }
        return Live(found, parts, lost(sent, interrupted_ms), late_ms)

    def _simulated(
        self, case: Scenario, policy: str, seed: int, told: Demand, late_ms: Array
    ) -> Figures:
        workload = case.workload(self._latencies, self._requests, seed, self._trace)
        sent_s = np.maximum.accumulate(workload.arrivals_s + late_ms / 1e3)
        tables = Tables(self._latencies)
        chosen = OWN.get(policy) or RIVALS[policy](tables, len(tables.unit_ms) // 2)
        outcome = scenarios.run(
            self._quantiles,
            replace(workload, arrivals_s=sent_s),
            chosen,
            seed,
            spell=SlowSpell(0.0, math.inf, told.slower),
            request_ms=told.request_ms,
            batch_ms=told.batch_ms,
        )
        late_ms = 1e3 * (sent_s - workload.arrivals_s)
        # As with the way of live ones.
        own = replace(workload, targets_ms=workload.targets_ms + told.request_ms)
        counted = replace(outcome, workload=own, latency_ms=outcome.latency_ms + late_ms)
        return figures(counted, self._latencies)


def _mean_batch(sent: Sequence[Sent]) -> float:
    """Return the mean of how many requests shared a batch."""
    shares = [1 / one.rows for one in sent if one.rows]
    return len(shares) / sum(shares) if shares else math.nan


def _mean(runs: Sequence[Figures], name: str) -> float:
    return sum(run[name] for run in runs) / len(runs)


def _difference(
    live: Sequence[Figures], simulated: Sequence[Figures], name: str
) -> tuple[float, float] | None:
    """Return the mean difference in a figure, seed by seed, and half its 95 % interval.

    None where a run has no such figure, as accuracy where no target was met.
    """
    pairs = zip(live, simulated, strict=True)
    return over_seeds([{name: a[name] - b[name]} for a, b in pairs])[name]


def picture(rows: Sequence[Row]) -> Figure:
    """Return a picture: targets met, and accuracy of those, simulated against live."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for axes, name, what in zip(
        figure.subplots(1, 2),
        ("met", "accuracy"),
        ("targets met, %", "accuracy of targets met, %"),
        strict=True,
    ):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            own = [row for row in rows if row["policy"] == policy]
            pairs = [(row["simulated"][name], row["live"][name]) for row in own]
            known = [(100 * a[0], 100 * b[0]) for a, b in pairs if a and b]
            x, y = [pair[0] for pair in known], [pair[1] for pair in known]
            axes.plot(x, y, "o", label=policy, alpha=0.7)
        ends = axes.get_xlim()
        axes.plot(ends, ends, color="gray", linewidth=0.8, zorder=0)
        axes.set_xlabel(f"simulated: {what}")
        axes.set_ylabel(f"live: {what}")
        axes.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    main()
