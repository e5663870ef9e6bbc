"""The event loop: arrivals, batches that end, and replicas behind a balancer."""

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulator.host import Host
from benchmarks.simulator.workloads import Array, Workload
from server.latencies import Latencies
from server.requests import Admitted, Request
from server.scheduler import Scheduler

Balancer = Callable[[Sequence[Scheduler]], int]


@dataclass(slots=True)
class Outcome:
    """What became of each request, in order of arrival. NaN latency: not served.

    latency_ms (n,), from arrival to answer; accuracy (n,), of the point that served it;
    decision_us: time that each plan took on the machine that simulates.
    """

    workload: Workload
    latency_ms: Array
    accuracy: Array
    batch_rows: list[int] = field(default_factory=list)
    decision_us: list[float] = field(default_factory=list)

    @property
    def met(self) -> NDArray[np.bool_]:
        """Return (n,) bool: answered within the target."""
        return np.asarray(self.latency_ms <= self.workload.targets_ms)


@dataclass(frozen=True, slots=True)
class Replica:
    """One server: its scheduler, and the host that it runs on."""

    scheduler: Scheduler
    host: Host
    latencies: Latencies


def shortest_queue(schedulers: Sequence[Scheduler]) -> int:
    """Send to the replica with the fewest requests waiting and batches running."""
    return min(range(len(schedulers)), key=lambda i: schedulers[i].waiting + schedulers[i].running)


def simulate(
    workload: Workload,
    replicas: Sequence[Replica],
    *,
    balance: Balancer = shortest_queue,
    time_decisions: bool = False,
) -> Outcome:
    """Return what becomes of a workload. Open loop: arrivals wait for nobody."""
    return _Run(workload, replicas, balance, time_decisions).outcome()


class _Run:
    def __init__(
        self,
        workload: Workload,
        replicas: Sequence[Replica],
        balance: Balancer,
        time_decisions: bool,
    ) -> None:
        n = len(workload.arrivals_s)
        self._result = Outcome(workload, np.full(n, np.nan), np.full(n, np.nan))
        self._latency_ms = [math.nan] * n
        self._accuracy = [math.nan] * n
        self._replicas = replicas
        self._schedulers = [replica.scheduler for replica in replicas]
        self._balance = balance
        self._time_decisions = time_decisions
        self._heap: list[tuple[float, int, int, int, float]] = []
        self._events = 0
        self._running: dict[tuple[int, int], float] = {}
        self._woken: list[float] = [math.inf] * len(replicas)

    def outcome(self) -> Outcome:
        workload, heap = self._result.workload, self._heap
        arrivals = workload.arrivals_s.tolist()
        targets = workload.targets_ms.tolist()
        for i, (arrival_s, target_ms) in enumerate(zip(arrivals, targets, strict=True)):
            while heap and heap[0][0] <= arrival_s:
                self._finish(*heapq.heappop(heap))
            at = self._balance(self._schedulers) if len(self._schedulers) > 1 else 0
            scheduler = self._schedulers[at]
            request = Request(str(i), arrival_s, arrival_s + target_ms / 1e3)
            if isinstance(scheduler.submit(request, arrival_s), Admitted) and scheduler.has_slot:
                self._dispatch(at, arrival_s)
        while heap:
            self._finish(*heapq.heappop(heap))
        self._result.latency_ms = np.asarray(self._latency_ms)
        self._result.accuracy = np.asarray(self._accuracy)
        return self._result

    def _finish(self, now: float, _: int, at: int, batch_id: int, measured_ms: float) -> None:
        scheduler = self._schedulers[at]
        if batch_id < 0:
            self._woken[at] = math.inf
        else:
            accuracy = self._running.pop((at, batch_id))
            overhead_ms = self._replicas[at].latencies.overhead_ms
            for request in scheduler.done(batch_id, measured_ms, now):
                i = int(request.id)
                self._latency_ms[i] = 1e3 * (now - request.arrival_s) + overhead_ms
                self._accuracy[i] = accuracy
        if scheduler.waiting:
            self._dispatch(at, now)

    def _dispatch(self, at: int, now: float) -> None:
        scheduler, replica = self._schedulers[at], self._replicas[at]
        while scheduler.has_slot and scheduler.waiting:
            began = time.perf_counter() if self._time_decisions else 0.0
            plan = scheduler.plan(now)
            if self._time_decisions:
                self._result.decision_us.append(1e6 * (time.perf_counter() - began))
            if plan.batch is None:
                if plan.wake_s is not None and now < plan.wake_s < self._woken[at]:
                    self._woken[at] = plan.wake_s
                    self._push(plan.wake_s, at, -1, 0.0)
                return
            batch = plan.batch
            self._result.batch_rows.append(batch.rows)
            took_ms = replica.host.draw_ms(batch.point, batch.rows, now)
            self._running[at, batch.id] = replica.latencies.accuracy[batch.point]
            self._push(now + took_ms / 1e3, at, batch.id, took_ms)

    def _push(self, when: float, at: int, batch_id: int, measured_ms: float) -> None:
        self._events += 1
        heapq.heappush(self._heap, (when, self._events, at, batch_id, measured_ms))
