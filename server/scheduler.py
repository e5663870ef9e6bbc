"""The queue in front of the engine: take in, plan, resolve. A state machine without a clock.

Every call takes `now` in seconds; a clock that runs backwards is read as standing still. What
runs where, and who is told, is the caller's business.
"""

import math
from dataclasses import dataclass

from server.admission import Admission
from server.explaining import explained
from server.forecast import Forecast
from server.latencies import Latencies
from server.outlook import Expected, Finished, View, due_by_place, limits_behind_ms
from server.requests import Admitted, Batch, Explanation, Plan, Refusal, Request
from server.selector import Choice, Policy, choose
from server.slowdown import Slowdown
from server.tables import MS, Tables
from server.waiting import Entry, WaitingList


@dataclass(slots=True, eq=False)
class _Running:
    batch: Batch
    ends_s: float  # when it usually ends
    cancelled: set[str]


class Scheduler:
    """Requests in, batches out.

    policy: which batch to run (`selector.choose`). slots: batches that may run at once.
    sheds: refuse and give up what can't be on time; False for policies that don't know how.
    """

    def __init__(
        self,
        latencies: Latencies,
        *,
        policy: Policy = choose,
        max_queue: int = 1024,
        slots: int = 1,
        sheds: bool = True,
    ) -> None:
        if max_queue < 1 or slots < 1:
            raise ValueError(f"max_queue and slots must be at least 1, not {max_queue}, {slots}")
        self._tables = Tables(latencies)
        self._policy = policy
        self._max_queue = max_queue
        self._slots = slots
        self._sheds = sheds
        self._admission = Admission(self._tables, sheds=sheds)
        self._slowdown = Slowdown()
        self._forecast = Forecast(self._tables.p50_ms[0][0], self._tables.tail_ms[-1][-1])
        self._waiting = WaitingList()
        self._entries: dict[str, Entry] = {}
        self._running: dict[int, _Running] = {}
        self._where: dict[str, int] = {}  # request id -> batch id
        self._now = -math.inf
        self._arrivals = 0
        self._batches = 0
        self._draining = False
        self._finished: Finished | None = None

    # -- taking in ---------------------------------------------------------------------------

    def submit(self, request: Request, now: float) -> Admitted | Refusal:
        """Take a request in, or say at once why not.

        Raises:
            ValueError: its id is here already, its point doesn't exist, or its rows fill more
                than a batch.
        """
        now = self._tick(now)
        if request.id in self._entries or request.id in self._where:
            raise ValueError(f"request id {request.id!r} is here already")
        target_s = (request.deadline_s or math.inf) - request.arrival_s
        self._forecast.observe(now, request.rows, MS * target_s)
        entry, refusal = self._prepare(request, now)
        if refusal is None:
            refusal = self._no_room(entry, now)
        displaced: tuple[Request, ...] = ()
        if refusal is not None and refusal.reason in ("full", "overloaded"):
            displaced = self._displace_for(entry, now)
            refusal = refusal if not displaced else None
        if refusal is not None:
            return refusal
        self._waiting.add(entry)
        self._entries[request.id] = entry
        return Admitted(displaced)

    def _prepare(self, request: Request, now: float) -> tuple[Entry, Refusal | None]:
        """Return the entry, and why it can be refused whatever else waits."""
        self._arrivals += 1
        entry, refusal = self._admission.entry(request, self._factor(now), self._arrivals, now)
        if self._draining and (refusal is None or refusal.reason != "floor"):
            refusal = Refusal("draining", "the server is shutting down", retry_after_s=1.0)
        return entry, refusal

    def _no_room(self, entry: Entry, now: float) -> Refusal | None:
        """Return why the queue can't take the entry, if it can't."""
        if len(self._waiting) >= self._max_queue:
            return Refusal(
                "full",
                f"{self._max_queue} requests wait already",
                retry_after_s=self._drain_s(now),
            )
        if not self._sheds:
            return None
        view = self._view(now)
        wait_ms = self._wait_ms(entry, view)
        alone_ms = view.level * self._tables.p50_ms[entry.request.rows - 1][entry.lowest]
        if now + (wait_ms + alone_ms) / MS <= entry.expiry_s and not self._delays(entry, view):
            return None
        return Refusal(
            "overloaded",
            f"{len(self._waiting)} requests wait; with this one, one would be late",
            min_feasible_ms=wait_ms + alone_ms + self._tables.latencies.overhead_ms,
            retry_after_s=self._drain_s(now),
        )

    def _delays(self, entry: Entry, view: View) -> bool:
        """Return whether the entry would make one late that waits behind it."""
        if entry.expiry_s == math.inf:
            return False
        place = self._waiting.place(entry.order)
        if place == len(self._waiting):
            return False
        (limit_ms,) = limits_behind_ms(
            view, due_by_place(view), [place], entry.request.rows, tail=False
        )
        wait_ms = self._residual_ms(view.now) + view.drain_ms(place)
        return limit_ms < wait_ms

    def _displace_for(self, entry: Entry, now: float) -> tuple[Request, ...]:
        """Give up one waiting request of lower priority, if the entry then fits."""
        levels = [other.request.level for other in self._waiting]
        if not levels or max(levels) <= entry.request.level:
            return ()
        victim = max(self._waiting, key=lambda other: (other.request.level, other.order))
        self._waiting.remove(victim)
        if self._no_room(entry, now) is not None:
            self._waiting.add(victim)
            return ()
        del self._entries[victim.request.id]
        return (victim.request,)

    # -- running -----------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """Return the batch to run now, if a slot is free and something waits, and what expired."""
        now = self._tick(now)
        expired = self._expire(now)
        wake_s = self._next_expiry(now)
        if not self._waiting or not self.has_slot:
            return Plan(None, expired, wake_s)
        choice = self._policy(self._view(now))
        dropped = tuple(self._forget(e) for e in self._waiting.take(0, choice.drop))
        if choice.count == 0:
            return Plan(None, expired + dropped, min(wake_s or math.inf, choice.wait_until_s))
        return Plan(self._start(choice, now), expired + dropped, self._next_expiry(now))

    def done(self, batch_id: int, measured_ms: float, now: float) -> tuple[Request, ...]:
        """Return the requests to answer with the batch's results; hung-up ones are left out.

        Raises:
            KeyError: no such batch runs.
        """
        now = self._tick(now)
        batch = self._running[batch_id].batch
        column = batch.rows - 1
        self._slowdown.observe(
            measured_ms,
            self._tables.p50_ms[column][batch.point],
            self._tables.tail_ms[column][batch.point],
            now,
        )
        waited_ms = MS * (batch.started_s - batch.requests[0].arrival_s)
        self._finished = Finished(batch_id, batch.rows, batch.point, waited_ms, measured_ms)
        return self._release(batch_id)

    def failed(self, batch_id: int, now: float) -> tuple[Request, ...]:
        """Return the requests to fail because their engine call raised or hung.

        Raises:
            KeyError: no such batch runs.
        """
        self._tick(now)
        return self._release(batch_id)

    def cancel(self, request_id: str, now: float) -> bool:
        """Forget a request whose client hung up; return whether it was here.

        Running, its batch goes on, and `done` leaves it out.
        """
        self._tick(now)
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self._waiting.remove(entry)
            return True
        batch_id = self._where.pop(request_id, None)
        if batch_id is None:
            return False
        self._running[batch_id].cancelled.add(request_id)
        return True

    def drain(self) -> None:
        """Refuse what comes from now on. What waits is still served."""
        self._draining = True

    # -- looking -----------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many batches run."""
        return len(self._running)

    @property
    def has_slot(self) -> bool:
        """Return whether another batch may run now."""
        return len(self._running) < self._slots

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def slowdown(self, now: float) -> float:
        """Return what profiled tails are multiplied by now."""
        return self._factor(max(now, self._now))

    def explain(self, request: Request, now: float) -> Explanation:
        """Return what would be chosen for a request if it came now. Changes nothing.

        Raises:
            ValueError: as `submit`.
        """
        now = max(now, self._now)
        entry, refusal = self._prepare(request, now)
        refusal = refusal or self._no_room(entry, now)
        return explained(
            entry,
            refusal,
            self._tables.latencies,
            expiry_s=self._admission.expiry_s(request),
            wait_ms=self._wait_ms(entry, self._view(now)),
            slowdown=self._factor(now),
            waiting=len(self._waiting),
            now=now,
        )

    # -- inside ------------------------------------------------------------------------------

    def _tick(self, now: float) -> float:
        if math.isfinite(now):
            self._now = max(self._now, now)
        return self._now

    def _factor(self, now: float) -> float:
        return self._slowdown.factor(now) if self._sheds else 1.0

    def _view(self, now: float) -> View:
        forecast = self._forecast
        return View(
            now,
            self._waiting,
            self._tables,
            self._factor(now),
            self._slowdown.typical(now),
            self._slots,
            len(self._running),
            Expected(
                forecast.rate(now),
                forecast.windows_ms,
                forecast.envelopes,
                forecast.fading(now),
            ),
            self._finished,
        )

    def _start(self, choice: Choice, now: float) -> Batch:
        entries = self._waiting.take(choice.start, choice.count)
        requests = tuple(self._forget(entry) for entry in entries)
        rows = sum(request.rows for request in requests)
        self._batches += 1
        usual_ms = self._slowdown.typical(now) * self._tables.p50_ms[rows - 1][choice.point]
        tail_ms = self._factor(now) * self._tables.tail_ms[rows - 1][choice.point]
        batch = Batch(self._batches, requests, choice.point, rows, tail_ms, now)
        self._running[batch.id] = _Running(batch, now + usual_ms / MS, set())
        self._where.update((request.id, batch.id) for request in requests)
        return batch

    def _release(self, batch_id: int) -> tuple[Request, ...]:
        running = self._running.pop(batch_id)
        requests = tuple(r for r in running.batch.requests if r.id not in running.cancelled)
        for request in requests:
            self._where.pop(request.id, None)
        return requests

    def _forget(self, entry: Entry) -> Request:
        del self._entries[entry.request.id]
        return entry.request

    def _quickest_s(self, entry: Entry, now: float) -> float:
        """Return how long the entry usually takes when it runs alone and at its lowest point."""
        column = self._tables.p50_ms[entry.request.rows - 1]
        return self._slowdown.typical(now) * column[entry.lowest] / MS

    def _expire(self, now: float) -> tuple[Request, ...]:
        """Take out the heads that can't be on time any more."""
        if not self._sheds:
            return ()
        doomed = 0
        for entry in self._waiting:
            if now + self._quickest_s(entry, now) <= entry.expiry_s:
                break
            doomed += 1
        return tuple(self._forget(entry) for entry in self._waiting.take(0, doomed))

    def _next_expiry(self, now: float) -> float | None:
        if not self._waiting or not self._sheds:
            return None
        head = self._waiting.entries[0]
        doomed_s = head.expiry_s - self._quickest_s(head, now)
        return doomed_s if doomed_s < math.inf else None

    def _residual_ms(self, now: float) -> float:
        """Return how long it usually takes until a slot is free."""
        if self.has_slot:
            return 0.0
        return MS * max(0.0, min(running.ends_s for running in self._running.values()) - now)

    def _wait_ms(self, entry: Entry, view: View) -> float:
        """Return how long the entry usually waits: running batches, and who comes before it."""
        residual_ms = self._residual_ms(view.now)
        if not self._waiting:
            return residual_ms
        share = self._waiting.place(entry.order) / len(self._waiting)
        return residual_ms + view.drain_ms(share * self._waiting.rows)

    def _drain_s(self, now: float) -> float:
        return self._view(now).drain_ms(self._waiting.rows) / MS
