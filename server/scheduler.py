"""The queue in front of the engine: take in, plan, resolve. A state machine without a clock.

Every call takes `now` in seconds; a clock that runs backwards is read as standing still. What
runs where, and who is told, is the caller's business.
"""

import copy
import math
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from server.admission import Admission
from server.explaining import Planned, explained
from server.forecast import Forecast
from server.latencies import Latencies
from server.outlook import Expected, Finished, View, due_by_place, limits_behind_ms
from server.preemption import MOST_PREEMPTED, STOP_SHARE, Remaining, delays, pays
from server.requests import Admitted, Batch, Explanation, Plan, Refusal, Request
from server.selector import Choice, Policy, choose, reserve
from server.slowdown import Slowdown, Speed
from server.tables import MS, Tables
from server.waiting import Entry, WaitingList

# So many of lower priority may give way to one; whether each of the first is needed is looked at.
MOST_GIVE_WAY = 64
SPARED = 8
# One that would be late is taken in if it would be in time after this part of its wait. A queue
# that ends where the last is just in time has heads that are just in time as well, and these only
# allow small batches; where more wait, heads are given up for larger ones, which get more through.
HOPE = 0.5


@dataclass(slots=True, eq=False)
class _Running:
    batch: Batch
    entries: list[Entry]
    ends_s: float  # when it usually ends
    cancelled: set[str] = field(default_factory=set)
    is_preempted: bool = False

    def wanted(self) -> list[Entry]:
        """Return the entries that somebody still waits for."""
        return [entry for entry in self.entries if entry.request.id not in self.cancelled]


class Scheduler:
    """Requests in, batches out.

    policy: which batch to run (`selector.choose`). slots: batches that may run at once.
    sheds: refuse and give up what can't be on time; False for policies that don't know how.
    preempts: have batches interrupted for others (`server.preemption`).
    """

    def __init__(
        self,
        latencies: Latencies,
        *,
        policy: Policy = choose,
        max_queue: int = 1024,
        slots: int = 1,
        sheds: bool = True,
        preempts: bool = False,
    ) -> None:
        if max_queue < 1 or slots < 1:
            raise ValueError(f"max_queue and slots must be at least 1, not {max_queue}, {slots}")
        self._tables = Tables(latencies)
        self._policy = policy
        self._max_queue = max_queue
        self._slots = slots
        self._sheds = sheds
        self.preempts = preempts
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
        speed = self._speed(now)
        entry, refusal = self._prepare(request, now, speed)
        self._arrivals += 1
        if refusal is None:
            _observe(self._forecast, request, now)
        victims: list[Entry] = []
        if refusal is None:
            refusal, victims = self._room(entry, now, speed)
        if refusal is not None:
            if refusal.reason == "overloaded":
                self._forecast.lost(now, _target_ms(request))
            return refusal
        for victim in victims:
            self._waiting.remove(victim)
        self._waiting.add(entry)
        self._entries[request.id] = entry
        return Admitted(self._forget(victims))

    def _prepare(self, request: Request, now: float, speed: Speed) -> tuple[Entry, Refusal | None]:
        """Return the entry, and why it can be refused whatever else waits."""
        entry, refusal = self._admission.entry(request, speed, self._arrivals + 1, now)
        if self._draining and (refusal is None or refusal.reason != "floor"):
            refusal = Refusal("draining", "the server is shutting down", retry_after_s=1.0)
        return entry, refusal

    def _room(self, entry: Entry, now: float, speed: Speed) -> tuple[Refusal | None, list[Entry]]:
        """Return why the queue can't take the entry, or which others must leave if it does."""
        refusal = self._no_room(entry, now, speed)
        if refusal is None:
            return None, []
        if refusal.reason == "overloaded":
            with self._with([entry]):
                if self._preemptible(now, speed):
                    return None, []
        victims = self._victims(entry, now, speed)
        if victims:
            return None, victims
        hopes = refusal.reason == "overloaded" and not self._late_with(entry, now, speed, HOPE)
        return (None if hopes else refusal), []

    def _victims(self, entry: Entry, now: float, speed: Speed) -> list[Entry]:
        """Return those that must leave for the entry, as few as may be; none if it doesn't help."""
        lower = self._giving_way(entry)
        if not lower or not self._fits_without(lower, entry, now, speed):
            return []
        enough = bisect_left(
            range(len(lower)),
            True,
            lo=1,
            key=lambda count: self._fits_without(lower[:count], entry, now, speed),
        )
        victims = lower[:enough]
        for other in victims[:SPARED][::-1]:
            fewer = [victim for victim in victims if victim is not other]
            if self._fits_without(fewer, entry, now, speed):
                victims = fewer
        return victims

    def _fits_without(self, leaving: list[Entry], entry: Entry, now: float, speed: Speed) -> bool:
        """Return whether the queue could take the entry if these others left."""
        with self._without(leaving):
            return self._no_room(entry, now, speed) is None

    def _giving_way(self, entry: Entry) -> list[Entry]:
        """Return who may give up their places for the entry, those that go first first.

        They are of lower priority than the entry; or of the same, without a target where the entry
        has one. The last of the lowest is the first, and enough in a full queue. Where somebody
        would be late, those right before the entry help it and all behind it, and those right
        behind it the others there.
        """
        level, timed = entry.request.level, entry.expiry_s < math.inf
        lower = [
            other
            for other in self._waiting
            if other.request.level > level
            or (timed and other.request.level == level and other.expiry_s == math.inf)
        ]
        if not lower:
            return []
        last = max(lower, key=lambda e: (e.request.level, e.expiry_s == math.inf, e.order))
        before = [other for other in reversed(lower) if other.order < entry.order]
        behind = [
            other for other in lower if entry.order < other.order and other.expiry_s < math.inf
        ]
        near = sorted(before + behind, key=lambda e: -e.request.level)
        return [last, *(other for other in near if other is not last)][:MOST_GIVE_WAY]

    def _no_room(self, entry: Entry, now: float, speed: Speed) -> Refusal | None:
        """Return why the queue can't take the entry, if it can't."""
        if len(self._waiting.entries) >= self._max_queue:
            return Refusal(
                "full",
                f"{self._max_queue} requests wait already",
                retry_after_s=self._drain_s(now, speed),
            )
        if not self._sheds or entry.expiry_s == math.inf:  # it is never late
            return None
        if not self._late_with(entry, now, speed):
            return None
        return Refusal(
            "overloaded",
            f"{len(self._waiting)} requests wait; with this one, one would be late",
            retry_after_s=self._drain_s(now, speed),
        )

    def _late_with(self, entry: Entry, now: float, speed: Speed, part: float = 1.0) -> bool:
        """Return whether the entry would be late after a part of its wait, or make one late that
        waits behind it."""
        returning = [each for each in self._returning() if each.expiry_s < math.inf]
        if not returning:
            return self._makes_late(entry, now, speed, part)
        with self._with(returning):
            return self._makes_late(entry, now, speed, part)

    def _makes_late(self, entry: Entry, now: float, speed: Speed, part: float) -> bool:
        view = self._view(now, speed) if self._waiting.entries else None
        wait_ms = part * self._wait_ms(entry, self._residual_ms(now), view)
        if now + (wait_ms + speed[1] * entry.alone_ms) / MS > entry.expiry_s:
            return True
        return view is not None and self._delays(entry, view)

    def _delays(self, entry: Entry, view: View) -> bool:
        """Return whether the entry would make one late that waits behind it."""
        if entry.expiry_s == math.inf:
            return False
        place = self._waiting.place(entry.order)
        if place == len(self._waiting.entries):
            return False
        due = due_by_place(view).behind(entry.request.rows)
        (limit_ms,) = limits_behind_ms(view, due, [place], tail=False)
        wait_ms = self._residual_ms(view.now) + view.drain_ms(place)
        return limit_ms < wait_ms

    # -- running -----------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """Return the batch to run now, if a slot is free and something waits, and what expired."""
        now = self._tick(now)
        waiting = self._waiting.entries
        if not waiting:
            return Plan()
        speed = self._speed(now)
        gone = self._expire(now, speed)
        if not waiting:
            return Plan(None, gone)
        if not self.has_slot:
            return Plan(None, gone, self._next_expiry_s(speed), self._preempt(now, speed))
        choice = self._policy(self._view(now, speed))
        if choice.count == 0:
            wake_s = min(self._next_expiry_s(speed) or math.inf, choice.wait_until_s)
            return Plan(None, gone + self._give_up(choice.drop), wake_s)
        if choice.drop:
            gone += self._give_up(choice.drop)
        return Plan(self._start(choice, now, speed), gone, self._next_expiry_s(speed))

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
            max(measured_ms, MS * (now - batch.started_s)),
            self._tables.p50_ms[column][batch.point],
            self._tables.tail_ms[column][batch.point],
            now,
        )
        waited_ms = MS * (batch.started_s - batch.requests[0].arrival_s)
        self._finished = Finished(batch_id, batch.rows, batch.point, waited_ms, measured_ms)
        return self._release(batch_id)

    def preempted(self, batch_id: int, now: float) -> tuple[Request, ...]:
        """Return the requests that wait again as their batch was interrupted; no hung-up ones.

        Raises:
            KeyError: no such batch runs.
        """
        self._tick(now)
        entries = self._running[batch_id].wanted()
        requests = self._release(batch_id)
        for entry in entries:
            entry.preempted += 1
            self._waiting.add(entry)
            self._entries[entry.request.id] = entry
        return requests

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
        return self._speed(max(now, self._now))[0]

    def explain(self, request: Request, now: float) -> Explanation:
        """Return what would be chosen for a request if it came now. Changes nothing.

        Raises:
            ValueError: as `submit`.
        """
        now = max(now, self._now)
        speed = self._speed(now)
        waiting = len(self._waiting)
        entry, refusal = self._prepare(request, now, speed)
        victims: list[Entry] = []
        if refusal is None:
            refusal, victims = self._room(entry, now, speed)
        residual_ms, back = self._residual_ms(now), self._returning()
        with self._with([entry]):
            running = self._preemptible(now, speed) if refusal is None else None
        if running is not None:
            residual_ms, back = self._remaining(running, now, speed).stop_ms, running.wanted()
        with self._without(victims), self._with(back):
            return explained(
                entry,
                refusal,
                self._tables.latencies,
                expiry_s=self._admission.expiry_s(request),
                planned=Planned() if refusal else self._planned(entry, now, residual_ms, speed),
                is_own=self._policy in (choose, reserve),
                wait_ms=self._wait_ms(entry, residual_ms, self._view(now, speed)),
                interrupts=running is not None,
                slowdown=speed[0],
                waiting=waiting,
                now=now,
            )

    # -- inside ------------------------------------------------------------------------------

    def _preempt(self, now: float, speed: Speed) -> int | None:
        """Return the batch to interrupt now, if there is one; once."""
        running = self._preemptible(now, speed)
        if running is None:
            return None
        running.is_preempted = True
        running.ends_s = now + self._remaining(running, now, speed).stop_ms / MS
        return running.batch.id

    def _preemptible(self, now: float, speed: Speed) -> _Running | None:
        """Return the batch that should be interrupted for those that wait."""
        if not self.preempts or self.has_slot or not self._waiting.timed:
            return None
        last = max(self._running.values(), key=lambda each: each.ends_s)
        if last.is_preempted:
            return None
        remaining = self._remaining(last, now, speed)
        if remaining.usual_ms <= remaining.stop_ms or not delays(self._view(now, speed), remaining):
            return None
        wanted = last.wanted()
        if any(each.preempted >= MOST_PREEMPTED for each in wanted):
            return None
        with self._with([each for each in wanted if each.expiry_s < math.inf]):
            return last if pays(self._view(now, speed), remaining) else None

    def _returning(self) -> list[Entry]:
        """Return who will wait again: their batch is being interrupted."""
        interrupted = [each for each in self._running.values() if each.is_preempted]
        return [entry for each in interrupted for entry in each.wanted()]

    def _remaining(self, running: _Running, now: float, speed: Speed) -> Remaining:
        batch, p50_ms, level = running.batch, self._tables.p50_ms, speed[1]
        rows, lowest = 0, 0
        for entry in running.wanted():
            rows += entry.request.rows
            lowest = max(lowest, entry.lowest)
        return Remaining(  # of a batch whose clients all hung up, nothing again
            MS * max(0.0, running.ends_s - now),
            STOP_SHARE * level * p50_ms[batch.rows - 1][batch.point],
            level * p50_ms[rows - 1][lowest] if rows else 0.0,
        )

    def _planned(self, entry: Entry, now: float, residual_ms: float, speed: Speed) -> Planned:
        """Return what the next batch would mean for the entry."""
        then = now + residual_ms / MS
        gone = self._waiting.doomed(then, speed[1]) if self._sheds else []
        forecast = self._forecast.twin()  # which it would be part of, if it came
        _observe(forecast, entry.request, now)
        policy = copy.deepcopy(self._policy)  # some remember what they are asked
        with self._without(gone), self._with([entry]):
            view = self._view(then, speed, forecast)
            view.running = min(view.running, self._slots - 1)
            choice = policy(view)
            place = self._waiting.place(entry.order) - choice.drop
        is_in = 0 <= place - choice.start < choice.count
        return Planned(choice.point if is_in else None, place < 0)

    @contextmanager
    def _without(self, entries: list[Entry]) -> Iterator[None]:
        """Have these entries not wait, inside."""
        for entry in entries:
            self._waiting.remove(entry)
        try:
            yield
        finally:
            for entry in entries:
                self._waiting.add(entry)

    @contextmanager
    def _with(self, entries: list[Entry]) -> Iterator[None]:
        """Have these entries wait, inside."""
        for entry in entries:
            self._waiting.add(entry)
        try:
            yield
        finally:
            for entry in entries:
                self._waiting.remove(entry)

    def _tick(self, now: float) -> float:
        if self._now < now < math.inf:
            self._now = now
        return self._now

    def _speed(self, now: float) -> Speed:
        factor, level = self._slowdown.both(now)
        return factor if self._sheds else 1.0, level

    def _view(self, now: float, speed: Speed, forecast: Forecast | None = None) -> View:
        forecast = forecast or self._forecast
        return View(
            now,
            self._waiting,
            self._tables,
            speed[0],
            speed[1],
            self._slots,
            len(self._running),
            Expected(
                forecast.rate(now),
                forecast.windows_ms,
                forecast.envelopes,
                forecast.fading(now),
                forecast.overloaded(now),
            ),
            self._finished,
        )

    def _start(self, choice: Choice, now: float, speed: Speed) -> Batch:
        factor, level = speed
        self._batches += 1
        entries = self._waiting.take(choice.start, choice.count)
        requests = self._forget(entries)
        rows = 0
        for request in requests:
            rows += request.rows
            self._where[request.id] = self._batches
        usual_ms = level * self._tables.p50_ms[rows - 1][choice.point]
        tail_ms = factor * self._tables.tail_ms[rows - 1][choice.point]
        batch = Batch(self._batches, requests, choice.point, rows, tail_ms, now)
        self._running[batch.id] = _Running(batch, entries, now + usual_ms / MS)
        return batch

    def _release(self, batch_id: int) -> tuple[Request, ...]:
        running = self._running.pop(batch_id)
        requests = running.batch.requests
        if running.cancelled:
            requests = tuple(r for r in requests if r.id not in running.cancelled)
        for request in requests:
            self._where.pop(request.id, None)
        return requests

    def _give_up(self, count: int) -> tuple[Request, ...]:
        return self._forget(self._waiting.take(0, count))

    def _forget(self, entries: list[Entry]) -> tuple[Request, ...]:
        requests = tuple([entry.request for entry in entries])
        for request in requests:
            del self._entries[request.id]
        return requests

    def _expire(self, now: float, speed: Speed) -> tuple[Request, ...]:
        """Take out those that can't be on time any more."""
        if not self._sheds:
            return ()
        doomed = self._waiting.doomed(now, speed[1])
        if not doomed:
            return ()
        for entry in doomed:
            self._waiting.remove(entry)
            if not entry.late:
                self._forecast.lost(now, _target_ms(entry.request))
        return self._forget(doomed)

    def _next_expiry_s(self, speed: Speed) -> float | None:
        doom_s = self._waiting.next_doom_s(speed[1]) if self._sheds else math.inf
        return doom_s if doom_s < math.inf else None

    def _residual_ms(self, now: float) -> float:
        """Return how long it usually takes until a slot is free."""
        if self.has_slot:
            return 0.0
        return MS * max(0.0, min(running.ends_s for running in self._running.values()) - now)

    def _wait_ms(self, entry: Entry, residual_ms: float, view: View | None) -> float:
        """Return how long the entry usually waits: running batches, and who comes before it.

        view: None where nobody waits.
        """
        waiting = self._waiting
        if view is None or not waiting.entries:
            return residual_ms
        share = waiting.place(entry.order) / len(waiting.entries)
        return residual_ms + view.drain_ms(share * waiting.rows)

    def _drain_s(self, now: float, speed: Speed) -> float:
        """Return how long it usually takes until nothing waits, and a slot is free."""
        queued_ms = self._view(now, speed).drain_ms(self._waiting.rows)
        return (self._residual_ms(now) + queued_ms) / MS


def _observe(forecast: Forecast, request: Request, now: float) -> None:
    """Have a forecast take in a request that came."""
    forecast.observe(now, request.rows, _target_ms(request))


def _target_ms(request: Request) -> float:
    """Return the target, inf without one."""
    return MS * ((request.deadline_s or math.inf) - request.arrival_s)
