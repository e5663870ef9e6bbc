"""The workloads that policies are compared on, and the policies: what a run is made of."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.simulator import rivals, workloads
from benchmarks.simulator.events import Clock, Outcome, Replica, simulate
from benchmarks.simulator.host import Host, Quantiles, SlowSpell
from benchmarks.simulator.rivals import RIVALS
from benchmarks.simulator.workloads import Workload
from server.latencies import Latencies
from server.policies import OWN
from server.scheduler import Scheduler
from server.selector import Policy, choose, reserve
from server.tables import Tables

MAX_QUEUE = 4096
ARRIVALS = ("poisson", "gamma2", "gamma4", "gamma8", "ramp", "on-off", "trace")
BURSTY = ("gamma2", "gamma4", "gamma8", "trace")
# The target of all, over the median of the largest point alone; mixed ones are drawn around it.
TARGET = 3.0
MIXED = (1 / 3, 3.0)
# A period of the on-off load, in targets.
PERIOD = 40.0
# The parts of its slack that SlackFit is tried with, for its trade of accuracy for targets met.
SLACK_SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


@dataclass(frozen=True, slots=True)
class Scenario:
    """arrivals: one of ARRIVALS. load: mean rate over what the largest point alone carries."""

    arrivals: str
    load: float
    mixed: bool = False
    spell: SlowSpell | None = None

    @property
    def name(self) -> str:
        return f"{self.arrivals} {'mixed' if self.mixed else 'one'} {self.load:g}"

    def rate(self, tables: Tables) -> float:
        """Return requests a second."""
        return self.load * 1e3 / tables.unit_ms[-1]

    def workload(
        self, latencies: Latencies, count: int, seed: int, trace: Path | None = None
    ) -> Workload:
        """Return the requests of one seed.

        Raises:
            ValueError: a trace is asked for and none is given, or the file holds none.
        """
        rng = np.random.default_rng((seed, ARRIVALS.index(self.arrivals)))
        largest_ms = latencies.p50_ms[-1][0]
        target_ms = TARGET * largest_ms + latencies.overhead_ms
        rate = self.rate(Tables(latencies))
        arrivals_s = _arrivals_s(self.arrivals, rate, target_ms / 1e3, count, rng, trace)
        if not self.mixed:
            return Workload(self.name, arrivals_s, workloads.one_target(target_ms, count))
        low_ms, high_ms = (part * target_ms for part in MIXED)
        targets_ms = workloads.mixed_targets(low_ms, high_ms, count, rng)
        return Workload(self.name, arrivals_s, targets_ms)


def run(
    quantiles: Quantiles,
    workload: Workload,
    policy: Policy,
    seed: int,
    *,
    spell: SlowSpell | None = None,
    request_ms: float = 0.0,
    batch_ms: float = 0.0,
    preempts: bool = True,
    clock: Clock | None = None,
) -> Outcome:
    """Return what becomes of a workload on one host. Rivals give up only what is late already, and
    interrupt nothing.

    request_ms, batch_ms: what receiving and answering take (`events.Replica`). preempts: ours have
    batches interrupted. clock: times decisions.
    """
    latencies = quantiles.latencies()
    host = Host(quantiles, np.random.default_rng(1000 + seed), spell)
    sheds = policy in OWN.values()
    scheduler = Scheduler(
        latencies, policy=policy, max_queue=MAX_QUEUE, sheds=sheds, preempts=sheds and preempts
    )
    replica = Replica(scheduler, host, latencies, request_ms, batch_ms)
    return simulate(workload, [replica], clock=clock)


def policies(tables: Tables, rate: float) -> dict[str, Policy]:
    """Return ours and its rivals, new for each run: some of them learn."""
    carrying = rivals.carrying_point(tables, rate)
    others = {name: make(tables, carrying) for name, make in RIVALS.items()}
    return {"ours": choose, "reserve": reserve, **others}


def slack_fits(tables: Tables) -> dict[str, Policy]:
    """Return SlackFit with less than all of its slack: what it reaches at more targets met."""
    return {f"slackfit {share:g}": rivals.slack_fit(tables, share) for share in SLACK_SHARES}


def _arrivals_s(
    name: str,
    rate: float,
    target_s: float,
    count: int,
    rng: np.random.Generator,
    trace: Path | None,
) -> workloads.Array:
    if name.startswith("gamma"):
        return workloads.gamma(rate, float(name.removeprefix("gamma")), count, rng)
    if name == "ramp":
        return workloads.ramp(0.3 * rate, 1.7 * rate, count, rng)
    if name == "on-off":
        return workloads.on_off(rate, PERIOD * target_s, 0.5, count, rng)
    if name == "trace":
        if trace is None:
            raise ValueError("trace: give a file with one arrival time in seconds a line")
        return workloads.replay(trace, rate, count, rng)
    return workloads.poisson(rate, count, rng)
