"""`maestro bench load`: policies on live servers, over HTTP, beside what the simulator says.

A server of each policy runs in a process of its own, kept from the core that sends, and is started
anew for each load: it remembers bursts. All answer the same requests, one server at a time, in
random order in each round. Latency counts from when a request should have been sent. The simulator
draws from the profile that the servers use, and counts two things that are measured before: what
that server's event loop took for a request, in a run of others at the same load, and how much
slower the host is than when it was profiled, by lone requests just before each run. Beside it
stands what it says without either. Rows whose requests went out too late to be that load say so,
and are not compared.
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
from benchmarks.open_loop import Sent, send_all
from benchmarks.own_server import Server, cores_apart, npy_sample, profiled, server
from benchmarks.simulator import scenarios, workloads
from benchmarks.simulator.events import Outcome
from benchmarks.simulator.figures import Figures, figures, over_seeds
from benchmarks.simulator.host import Quantiles, SlowSpell
from benchmarks.simulator.rivals import RIVALS
from benchmarks.simulator.scenarios import ARRIVALS, Scenario
from benchmarks.simulator.workloads import Workload
from maestro_core import artifact
from maestro_core.host import Elsewhere
from maestro_core.profile import Profile
from server.dispatcher import INLINE_MS
from server.policies import OWN
from server.policy_names import PolicyName
from server.settings import shipped_artifact
from server.tables import Tables

POLICIES = (*OWN, "largest", "smallest", "slackfit", "infaas")
# Lone requests: so many. They warm a server up and tell what the way there and back takes; closer
# together, by so many times the longest latency, they tell how fast the host is.
LONE, APART_S, CLOSE = 100, 0.02, 1.7
# Seed of the requests by which is measured what receiving and answering them takes of a core.
BEFOREHAND = 10**6
AGREE = 0.02  # of targets met, live and simulated
# A row is compared where all but a hundredth were sent within so much of their target.
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
    parser.add_argument("--out", type=Path, default=report.RESULTS / "load.json")
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
    sent = [row for row in rows if row["kept_up"]]
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
        "compared": len(sent),
        "agreeing": sum(abs(row["difference"][0]) <= AGREE for row in sent),
        "rows": rows,
        "quantiles": asdict(quantiles),
    }
    report.write(result, chosen.out)
    draw(rows, chosen.out.with_suffix(".png"))


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
        simulated: dict[str, list[Figures]] = {}
        without_loop: dict[str, list[Figures]] = {}
        as_profiled: dict[str, list[Figures]] = {}
        loop_ms = {policy: self._loop_ms(case, policy) for policy in self._servers}
        for seed in range(rounds):
            order = list(self._servers)
            random.Random(f"{seed}/{case.name}").shuffle(order)
            for policy in order:
                slower = self._slower(policy)
                found = {**self._live(case, policy, seed), "slower_before": slower}
                live.setdefault(policy, []).append(found)
                for runs, taken_ms, times in (
                    (simulated, loop_ms[policy], slower),
                    (without_loop, 0.0, slower),
                    (as_profiled, loop_ms[policy], 1.0),
                ):
                    said = self._simulated(case, policy, seed, taken_ms, times)
                    runs.setdefault(policy, []).append(said)
        return [
            {
                "arrivals": case.arrivals,
                "load": case.load,
                "policy": policy,
                "way_ms": self.way_ms,
                "live": over_seeds(live[policy]),
                "loop_ms": loop_ms[policy],
                "simulated": over_seeds(simulated[policy]),
                "difference": _difference(live[policy], simulated[policy], "met"),
                "difference_without_loop": _difference(live[policy], without_loop[policy], "met"),
                "difference_as_profiled": _difference(live[policy], as_profiled[policy], "met"),
                "accuracy_difference": _difference(live[policy], simulated[policy], "accuracy"),
                "kept_up": _mean(live[policy], "sent_late_of_target") <= KEPT_UP,
            }
            for policy in live
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

    def _sent(self, server: Server, workload: Workload) -> tuple[list[Sent], float]:
        """Return what became of a workload, and what a request took of the event loop's core."""
        arrivals_s, targets_ms = workload.arrivals_s.tolist(), workload.targets_ms.tolist()
        before_s = server.loop_s()
        sent = self._send(server.address, arrivals_s, targets_ms)
        took_ms = 1e3 * (server.loop_s() - before_s)
        return sent, max(0.0, took_ms - _computed_on_loop_ms(sent)) / len(sent)

    def _loop_ms(self, case: Scenario, policy: str) -> float:
        """Return what a request takes of the core of a server's event loop at such a load."""
        workload = case.workload(self._latencies, self._requests, BEFOREHAND, self._trace)
        return self._sent(self._servers[policy], workload)[1]

    def _slower(self, policy: str) -> float:
        """Return how many times as long lone requests compute as when the host was profiled."""
        apart_s = CLOSE * self._latencies.p50_ms[-1][0] / 1e3
        return self._of_profiled(self._lone(self._servers[policy], apart_s))

    def _of_profiled(self, sent: Sequence[Sent]) -> float:
        """Return what computing took over its profiled median, in the median; NaN for none."""
        ratios = [
            one.compute_ms / self._profile.quantile_ms(one.point, one.rows, 50)
            for one in sent
            if one.rows
        ]
        return median(ratios) if ratios else math.nan

    def _live(self, case: Scenario, policy: str, seed: int) -> Figures:
        workload = case.workload(self._latencies, self._requests, seed, self._trace)
        sent, loop_ms = self._sent(self._servers[policy], workload)
        outcome = Outcome(
            replace(workload, targets_ms=workload.targets_ms + self.way_ms),
            np.array([one.latency_ms for one in sent]),
            np.array([one.accuracy for one in sent]),
        )
        late_ms = np.array([one.late_ms for one in sent])
        return {
            **figures(outcome, self._latencies),
            "sent_late_p50_ms": float(np.quantile(late_ms, 0.5)),
            "sent_late_p99_ms": float(np.quantile(late_ms, 0.99)),
            "sent_late_of_target": float(np.quantile(late_ms / workload.targets_ms, 0.99)),
            "loop_ms": loop_ms,
            "compute_of_profiled": self._of_profiled(sent),
        }

    def _simulated(
        self, case: Scenario, policy: str, seed: int, loop_ms: float, slower: float
    ) -> Figures:
        workload = case.workload(self._latencies, self._requests, seed, self._trace)
        tables = Tables(self._latencies)
        chosen = OWN.get(policy) or RIVALS[policy](tables, len(tables.unit_ms) // 2)
        always = SlowSpell(0.0, math.inf, slower)
        outcome = scenarios.run(
            self._quantiles, workload, chosen, seed, spell=always, request_ms=loop_ms
        )
        own = replace(workload, targets_ms=workload.targets_ms + loop_ms)  # as clients do with way
        return figures(replace(outcome, workload=own), self._latencies)


def _computed_on_loop_ms(sent: Sequence[Sent]) -> float:
    """Return for how long the thread of the event loop computed: it does short batches itself."""
    return sum(one.compute_ms / one.rows for one in sent if one.predicted_ms <= INLINE_MS)


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


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a picture: targets met, and accuracy of those, simulated against live."""
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
            axes.plot(*zip(*known, strict=True), "o", label=policy, alpha=0.7)
        ends = axes.get_xlim()
        axes.plot(ends, ends, color="gray", linewidth=0.8, zorder=0)
        axes.set_xlabel(f"simulated: {what}")
        axes.set_ylabel(f"live: {what}")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
