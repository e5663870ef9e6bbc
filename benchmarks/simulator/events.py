"""The event loop: arrivals, batches that end, and replicas behind a balancer."""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulator.host import Host
from benchmarks.simulator.workloads import Array, Workload
from server.latencies import Latencies
from server.requests import Admitted, Plan, Request
from server.scheduler import Scheduler

# What an event is, in the place of the number of a batch that ends.
_WOKEN = -1
_RECEIVED = -2  # and below: less the number of the request

# A run that is interrupted ends after the operator at hand, of about so many.
OPERATORS = 20

Balancer = Callable[[Sequence[Scheduler]], int]
Clock = Callable[[], float]  # s


@dataclass(slots=True)
class Outcome:
    """What became of each request, in order of arrival. NaN latency: not served.

    latency_ms (n,), from arrival to answer; accuracy (n,), of the point that served it;
    decision_us: time that each plan took on the machine that simulates, if it has a clock.
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
    """One server: its scheduler, and the host that it runs on.

    request_ms: what a request takes of the core that receives and answers, half of it before it is
    taken in, half after its batch, or when it is refused or given up. While a batch computes, that
    is taken from it.
    batch_ms: what a batch takes there, half of it before it computes, half after. With both 0,
    answers take the profile's overhead.
    """

    scheduler: Scheduler
    host: Host
    latencies: Latencies
    request_ms: float = 0.0
    batch_ms: float = 0.0


def shortest_queue(schedulers: Sequence[Scheduler]) -> int:
    """Send to the replica with the fewest requests waiting and batches running."""
    return min(range(len(schedulers)), key=lambda i: schedulers[i].waiting + schedulers[i].running)


def simulate(
    workload: Workload,
    replicas: Sequence[Replica],
    *,
    balance: Balancer = shortest_queue,
    clock: Clock | None = None,
) -> Outcome:
    """Return what becomes of a workload. Open loop: arrivals wait for nobody.

    clock: times the decisions; what becomes of the workload does not depend on it.
    """
    return _Run(workload, replicas, balance, clock).outcome()


@dataclass(slots=True)
class _Front:
    """What receives and answers at one replica."""

    request_s: float  # half of one
    batch_s: float  # half of one
    free_s: float = -math.inf
    taken_s: float = 0.0  # from the batch that computes, and not yet added to its end

    @property
    def counts(self) -> bool:
        return self.request_s > 0 or self.batch_s > 0

    def busy_until(self, now: float, work_s: float) -> float:
        """Return when work that comes now is done."""
        self.free_s = max(now, self.free_s) + work_s
        return self.free_s


class _Run:
    def __init__(
        self,
        workload: Workload,
        replicas: Sequence[Replica],
        balance: Balancer,
        clock: Clock | None,
    ) -> None:
        n = len(workload.arrivals_s)
        self._result = Outcome(workload, np.full(n, np.nan), np.full(n, np.nan))
        self._latency_ms = [math.nan] * n
        self._accuracy = [math.nan] * n
        self._replicas = replicas
        self._schedulers = [replica.scheduler for replica in replicas]
        self._balance = balance
        self._clock = clock
        self._fronts = [_Front(r.request_ms / 2e3, r.batch_ms / 2e3) for r in replicas]
        self._heap: list[tuple[float, int, int, int, float]] = []
        self._events = 0
        self._running: dict[tuple[int, int], tuple[float, float]] = {}  # accuracy, ms
        self._woken: list[float] = [math.inf] * len(replicas)

    def outcome(self) -> Outcome:
        workload, heap = self._result.workload, self._heap
        arrivals = workload.arrivals_s.tolist()
        targets = workload.targets_ms.tolist()
        for i, (arrival_s, target_ms) in enumerate(zip(arrivals, targets, strict=True)):
            while heap and heap[0][0] <= arrival_s:
                self._finish(*heapq.heappop(heap))
            at = self._balance(self._schedulers) if len(self._schedulers) > 1 else 0
            front = self._fronts[at]
            if not front.counts:
                self._submit(at, i, target_ms, arrival_s)
                continue
            if self._schedulers[at].running:
                front.taken_s += front.request_s
            received_s = front.busy_until(arrival_s, front.request_s)
            self._push(received_s, at, _RECEIVED - i, target_ms)
        while heap:
            self._finish(*heapq.heappop(heap))
        self._result.latency_ms = np.asarray(self._latency_ms)
        self._result.accuracy = np.asarray(self._accuracy)
        return self._result

    def _submit(self, at: int, i: int, target_ms: float, now: float) -> None:
        scheduler = self._schedulers[at]
        request = Request(str(i), now, now + target_ms / 1e3)
        outcome = scheduler.submit(request, now)
        if not isinstance(outcome, Admitted):
            self._refuse(at, 1, now)
            return
        self._refuse(at, len(outcome.displaced), now)
        if scheduler.has_slot or scheduler.preempts:
            self._dispatch(at, now)

    def _refuse(self, at: int, count: int, now: float) -> None:
        """Tell so many requests that they are not served."""
        front = self._fronts[at]
        if count and front.counts:
            front.busy_until(now, count * front.request_s)
            if self._schedulers[at].running:
                front.taken_s += count * front.request_s

    def _finish(self, now: float, _: int, at: int, what: int, ms: float) -> None:
        """Do what is due: a request received, a wake-up, or a batch that ends (its number, ms; NaN
        where it is interrupted)."""
        if what <= _RECEIVED:
            self._submit(at, _RECEIVED - what, ms, now)
            return
        scheduler, front = self._schedulers[at], self._fronts[at]
        if what == _WOKEN:
            self._woken[at] = math.inf
        elif (at, what) not in self._running:  # it was interrupted, or done before that
            return
        elif math.isnan(ms):
            del self._running[at, what]
            front.taken_s = 0.0
            scheduler.preempted(what, now)
        elif front.taken_s:
            later_s, front.taken_s = now + front.taken_s, 0.0
            self._push(later_s, at, what, ms + 1e3 * (later_s - now))
            return
        else:
            self._answer(at, what, ms, now)
            if front.free_s > now:  # answers are written first
                self._push(front.free_s, at, _WOKEN, 0.0)
                return
        if scheduler.waiting:
            self._dispatch(at, now)

    def _answer(self, at: int, batch_id: int, measured_ms: float, now: float) -> None:
        accuracy, _ = self._running.pop((at, batch_id))
        replica, arrivals_s = self._replicas[at], self._result.workload.arrivals_s
        front = self._fronts[at]
        front.busy_until(now, front.batch_s)
        for request in replica.scheduler.done(batch_id, measured_ms, now):
            i = int(request.id)
            if front.counts:
                answered_s = front.busy_until(now, front.request_s)
                self._latency_ms[i] = 1e3 * (answered_s - float(arrivals_s[i]))
            else:
                overhead_ms = replica.latencies.overhead_ms
                self._latency_ms[i] = 1e3 * (now - request.arrival_s) + overhead_ms
            self._accuracy[i] = accuracy

    def _dispatch(self, at: int, now: float) -> None:
        scheduler, replica = self._schedulers[at], self._replicas[at]
        while scheduler.waiting and (scheduler.has_slot or scheduler.preempts):
            plan = self._planned(scheduler, now)
            self._refuse(at, len(plan.expired), now)
            if plan.preempt is not None:
                _, took_ms = self._running[at, plan.preempt]
                self._push(now + took_ms / OPERATORS / 1e3, at, plan.preempt, math.nan)
            if plan.batch is None:
                if plan.wake_s is not None and now < plan.wake_s < self._woken[at]:
                    self._woken[at] = plan.wake_s
                    self._push(plan.wake_s, at, _WOKEN, 0.0)
                return
            batch = plan.batch
            self._result.batch_rows.append(batch.rows)
            took_ms = replica.host.draw_ms(batch.point, batch.rows, now)
            self._running[at, batch.id] = replica.latencies.accuracy[batch.point], took_ms
            front = self._fronts[at]
            began_s = front.busy_until(now, front.batch_s)  # what came is received before
            self._push(began_s + took_ms / 1e3, at, batch.id, took_ms)

    def _planned(self, scheduler: Scheduler, now: float) -> Plan:
        if self._clock is None:
            return scheduler.plan(now)
        began_s = self._clock()
        plan = scheduler.plan(now)
        self._result.decision_us.append(1e6 * (self._clock() - began_s))
        return plan

    def _push(self, when: float, at: int, what: int, ms: float) -> None:
        self._events += 1
        heapq.heappush(self._heap, (when, self._events, at, what, ms))
