"""`maestro bench load`: policies on live servers, over HTTP, beside what the simulator says.

A server of each policy runs in a process of its own, kept from the core that sends, and is started
anew for each load: it remembers bursts. All answer the same requests, one server at a time, in
random order in each round. Latency counts from when a request should have been sent. The simulator
draws from the profile that the servers use, and is told when each request really went out, and what
serving took of the cores (`benchmarks.demand`) in the very run that it is set beside: the host's
speed changes within minutes. Beside it stands what it says by what was measured before: at the same
load, with other requests, and by lone requests just before each run; without the event loop; and by
the profile as it was. Rows whose requests went out too late to be that load say so.
"""

import argparse
import asyncio
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from benchmarks import arguments, report
from benchmarks.demand import Demand, Taken, demand
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
# Lone requests: so many. They warm a server up and tell what the way there and back takes; closer
# together, by so many times the longest latency, what one takes that shares its batch with none.
LONE, APART_S, CLOSE = 100, 0.02, 1.7
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
    with cores_apart() as (sending, serving), ExitStack() as stack:
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
        live: dict[str, list[Figures]] = {}
        simulated: dict[str, dict[str, list[Figures]]] = {}
        before = {policy: self._taken(case, policy, BEFOREHAND) for policy in self._servers}
        for seed in range(rounds):
            order = list(self._servers)
            random.Random(f"{seed}/{case.name}").shuffle(order)
            for policy in order:
                lone = self._lone_taken(policy)
                found, taken, late_ms = self._live(case, policy, seed)
                meanwhile = demand(taken, lone)
                live.setdefault(policy, []).append({**found, **asdict(meanwhile)})
                told = {
                    "simulated": meanwhile,
                    "beforehand": replace(demand(before[policy], lone), slower=lone.slower),
                    "without_loop": replace(meanwhile, request_ms=0.0, batch_ms=0.0),
                    "as_profiled": replace(meanwhile, slower=1.0),
                }
                runs = simulated.setdefault(policy, {})
                for name, demanded in told.items():
                    said = self._simulated(case, policy, seed, demanded, late_ms)
                    runs.setdefault(name, []).append(said)
        return [
            {
                "arrivals": case.arrivals,
                "load": case.load,
                "policy": policy,
                "way_ms": self.way_ms,
                "live": over_seeds(live[policy]),
                "simulated": over_seeds(runs["simulated"]),
                "difference": _difference(live[policy], runs["simulated"], "met"),
                **{
                    f"difference_{name}": _difference(live[policy], runs[name], "met")
                    for name in ("beforehand", "without_loop", "as_profiled")
                },
                "accuracy_difference": _difference(live[policy], runs["simulated"], "accuracy"),
                "kept_up": _mean(live[policy], "sent_late_of_target") <= KEPT_UP,
            }
            for policy, runs in simulated.items()
        ]

    def _lone(self, server: Server, apart_s: float) -> list[Sent]:
        """Return what became of requests that no other waits for."""
        arrivals_s = [i * apart_s for i in range(LONE)]
        return self._send(server.address, arrivals_s, [1e4] * LONE)

    def _way_ms(self, server: Server) -> float:
        """Return the median of what a lone request takes beyond what the server counts, in ms."""
        sent = self._lone(server, APART_S)
        return median(one.latency_ms - one.server_ms for one in sent if one.status == 200)

    def _send(
        self, address: str, arrivals_s: Sequence[float], targets_ms: Sequence[float]
    ) -> list[Sent]:
        sending = send_all(
            f"{address}/infer", self._body, "application/x-npy", arrivals_s, targets_ms
        )
        return asyncio.run(sending)

    def _sent(self, server: Server, workload: Workload) -> tuple[list[Sent], Taken]:
        """Return what became of a workload, and what serving it took."""
        before = server.core_time()
        arrivals_s, targets_ms = workload.arrivals_s.tolist(), workload.targets_ms.tolist()
        sent = self._send(server.address, arrivals_s, targets_ms)
        return sent, Taken.of(sent, server.core_time() - before, self._mean_ms)

    def _taken(self, case: Scenario, policy: str, seed: int) -> Taken:
        """Return what serving takes at such a load."""
        workload = case.workload(self._latencies, self._requests, seed, self._trace)
        return self._sent(self._servers[policy], workload)[1]

    def _lone_taken(self, policy: str) -> Taken:
        """Return what serving requests takes that share their batches with none."""
        server, apart_s = self._servers[policy], CLOSE * self._latencies.p50_ms[-1][0] / 1e3
        before = server.core_time()
        sent = self._lone(server, apart_s)
        return Taken.of(sent, server.core_time() - before, self._mean_ms)

    def _mean_ms(self, point: int, rows: int) -> float:
        return mean_ms(*(self._profile.quantile_ms(point, rows, q) for q in (50, 90, 95, 99)))

    def _live(self, case: Scenario, policy: str, seed: int) -> tuple[Figures, Taken, Array]:
        """Return figures, what serving took, and by how many ms each request went out late."""
        workload = case.workload(self._latencies, self._requests, seed, self._trace)
        sent, taken = self._sent(self._servers[policy], workload)
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
            "batch": taken.requests / taken.batches if taken.batches else math.nan,
        }
        return found, taken, late_ms

    def _simulated(
        self, case: Scenario, policy: str, seed: int, taken: Demand, late_ms: Array
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
            spell=SlowSpell(0.0, math.inf, taken.slower),
            request_ms=taken.request_ms,
            batch_ms=taken.batch_ms,
        )
        late_ms = 1e3 * (sent_s - workload.arrivals_s)
        # As with the way of live ones.
        own = replace(workload, targets_ms=workload.targets_ms + taken.request_ms)
        counted = replace(outcome, workload=own, latency_ms=outcome.latency_ms + late_ms)
        return figures(counted, self._latencies)


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
