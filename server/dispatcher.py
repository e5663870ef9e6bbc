"""Drives the scheduler with real time: an event loop that plans, threads that compute.

What runs next is the scheduler's decision; who is told what, and when, is decided here.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from server.answers import Inference
from server.errors import (
    InfeasibleError,
    InvalidError,
    OutOfTimeError,
    ServiceError,
    UnavailableError,
)
from server.hangups import HangUps, Receive
from server.interrupt import Interrupt, InterruptedRunError
from server.requests import Batch, Refusal, Request
from server.scheduler import Scheduler
from server.watchdog import Watchdog
from server.worker import Turns, Worker

Floats = NDArray[np.float32]

log = logging.getLogger("maestro")

MS = 1e3
# A batch that takes this many times its predicted tail, and at least this long, is taken to hang:
# if it computes at each of so many looks meanwhile. A process that was stopped for a while looks
# once, and goes on.
HANG_FACTOR = 20.0
HANG_MIN_S = 2.0
LOOKS = 4
# A batch this short is computed on the event loop: handing it to a thread and back would cost as
# much again, and whoever arrives meanwhile would wait for it anyway. Not while a trial computes:
# the loop would wait for that too.
INLINE_MS = 1.0
# The loop's timers count whole milliseconds: one of less would be called at once, again and again.
LEAST_WAIT_S = 1e-3
# So many times as long a batch is waited for whose turn to compute does not come, as behind a trial
# that hangs.
MOST_WAITS = 10
# A failing engine fails at every batch: it is told in the log so often.
TOLD_S = 1.0


# Told what became of a request: once, and never from within `begin`.
Tell = Callable[[Inference | ServiceError], None]


class Runner(Protocol):
    """What computes: the engine, or a fake."""

    def run(self, batch: Floats, point: int, interrupt: Interrupt | None = None, /) -> Floats:
        """Return the output (n, …) for a batch (n, …) at a point.

        Raises:
            InterruptedRunError: it was ended before it had it.
        """


@dataclass(slots=True)
class _Caller:
    x: Floats
    tell: Tell


@dataclass(slots=True)
class _Flight:
    batch: Batch
    callers: dict[str, _Caller]
    worker: Worker | None = None  # None: computed on the event loop
    interrupt: Interrupt | None = None  # None: it runs to its end
    watch: asyncio.TimerHandle | None = None
    began: bool = False  # the engine has it: a trial of a calibration may come before
    looks: int = 0  # that found it computing
    waits: int = 0  # that did not


class Dispatcher:
    """Takes requests from the event loop that it is made on, and answers each once.

    shares_core: computing takes the event loop's core too. Then answers go out before the next
    batch begins: else they wait for as long as the kernel lets it compute.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        turns: Turns,
        *,
        slots: int = 1,
        shares_core: bool = True,
        on_batch: Callable[[Batch, float], None] = lambda _batch, _seconds: None,
        on_decision: Callable[[float], None] = lambda _seconds: None,
        on_preemption: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._turns = turns
        self._on_batch = on_batch
        self._on_decision = on_decision
        self._on_preemption = on_preemption
        self._slots = slots
        self._shares_core = shares_core
        self._loop = asyncio.get_running_loop()
        self._free = [Worker(f"compute-{i}") for i in range(slots)]
        self._callers: dict[str, _Caller] = {}
        self._hang_ups = HangUps()
        self._will_pump = False
        self._flights: dict[int, _Flight] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._watchdog: Watchdog | None = None  # of what is computed on the event loop
        self._told_s = -math.inf  # when a failure of the engine was last in the log
        self._drained = asyncio.Event()

    async def infer(self, request: Request, x: Floats, receive: Receive | None = None) -> Inference:
        """Return the output for `x` (rows, …) as the scheduler has it run.

        `receive` tells when the client hangs up: a request that waits then gives up its place.

        Raises:
            ServiceError: refused, out of time, or the engine failed.
            ClientDisconnect: the client hung up.
        """
        future: asyncio.Future[Inference] = self._loop.create_future()
        self.begin(request, x, partial(_settle, future))
        if receive is not None:
            self._hang_ups.expect(future, receive)
        try:
            return await future
        except (asyncio.CancelledError, ClientDisconnect):
            self.give_up(request.id)
            raise
        finally:
            self._hang_ups.forget(future)

    def begin(self, request: Request, x: Floats, tell: Tell) -> Callable[[], None]:
        """Take a request in; `tell` gets the output for `x` (rows, …) or what went wrong.

        What is returned gives it up, as `give_up` does.

        Raises:
            ServiceError: it is refused.
        """
        try:
            verdict = self.scheduler.submit(request, time.monotonic())
        except ValueError as error:
            raise InvalidError(str(error)) from error
        if isinstance(verdict, Refusal):
            raise refused(verdict)
        for displaced in verdict.displaced:
            gave_way = UnavailableError(
                "a request of higher priority, or with a target, came", reason="displaced"
            )
            self._fail(displaced.id, gave_way)
        self._callers[request.id] = _Caller(x, tell)
        self._pump_soon()
        return partial(self.give_up, request.id)

    def give_up(self, request_id: str) -> None:
        """Forget a request whose client hung up: nobody is told any more."""
        self._callers.pop(request_id, None)
        self.scheduler.cancel(request_id, time.monotonic())
        self._pump()

    async def drain(self, limit_s: float | None) -> None:
        """Take no more requests; wait until those taken are answered, `limit_s` at most if given.

        The rest, waiting or running, is answered that the server is shutting down.
        """
        self.scheduler.drain()
        self._drained.clear()
        self._pump()
        try:
            async with asyncio.timeout(limit_s):
                await self._drained.wait()
        except TimeoutError:
            leaving = UnavailableError("the server is shutting down", reason="draining")
            for request_id in list(self._callers):
                self._fail(request_id, leaving)
                self.scheduler.cancel(request_id, time.monotonic())
            for flight in list(self._flights.values()):
                self._give_up_on(flight, leaving)

    def close(self) -> None:
        """Let the threads end."""
        if self._timer:
            self._timer.cancel()
        if self._watchdog:
            self._watchdog.close()
        for worker in self._free:
            worker.stop()

    def _pump_soon(self) -> None:
        """Plan once all that came in this turn of the loop are here: they can share a batch."""
        if not self._will_pump:
            self._will_pump = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Start what the scheduler plans, and be back when it wants to be asked again."""
        self._will_pump = False
        while True:
            now, waited = time.monotonic(), self.scheduler.waiting
            plan = self.scheduler.plan(now)
            if waited:
                self._on_decision(time.monotonic() - now)
            for request in plan.expired:
                late = OutOfTimeError("the deadline passed while it waited", reason="expired")
                self._fail(request.id, late)
            if plan.preempt is not None and (interrupt := self._flights[plan.preempt].interrupt):
                interrupt.set()
            if plan.batch is None:
                break
            self._start(plan.batch)
            if not self.scheduler.waiting:
                break
            if self.scheduler.has_slot:  # it was computed here: its answers go out first
                self._pump_soon()
                break
        if self._timer:
            self._timer.cancel()
        self._timer = None
        if plan.wake_s is not None:
            after_s = max(LEAST_WAIT_S, plan.wake_s - time.monotonic())
            self._timer = self._loop.call_later(after_s, self._pump)
        idle = self.scheduler.is_idle
        self._turns.set_idle(idle)
        if idle:
            self._drained.set()

    def _start(self, batch: Batch) -> None:
        callers = {request.id: self._callers.pop(request.id) for request in batch.requests}
        lock = self._turns.computing
        is_short = self._slots == 1 and batch.predicted_ms <= INLINE_MS
        if is_short and lock.acquire(blocking=False):
            self._turns.note_request()
            flight = self._flights[batch.id] = _Flight(batch, callers)
            if self._watchdog is None:
                self._watchdog = Watchdog()
            try:
                with self._watchdog:
                    computed = self._computed(flight)
            finally:
                lock.release()
            self._finished(batch.id, *computed)
            return
        self._turns.set_idle(False)
        worker = self._free.pop()
        interrupt = Interrupt() if self.scheduler.preempts else None
        flight = self._flights[batch.id] = _Flight(batch, callers, worker, interrupt)
        self._watch(flight)
        worker.submit(partial(self._compute, flight))

    def _watch(self, flight: _Flight) -> None:
        limit_s = max(HANG_MIN_S, HANG_FACTOR * flight.batch.predicted_ms / MS)
        flight.watch = self._loop.call_later(limit_s / LOOKS, self._look, flight.batch.id)

    def _compute(self, flight: _Flight) -> None:
        """Run a batch; in a worker's thread."""
        batch = flight.batch
        with self._turns.computing:
            result = self._computed(flight)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._finished_elsewhere, batch.id, *result)

    def _computed(self, flight: _Flight) -> tuple[Floats | None, Exception | None, float, float]:
        """Return the output or the error, when it began, and how long it took in seconds.

        The turn to compute is taken already.
        """
        output: Floats | None = None
        error: Exception | None = None
        flight.began = True
        began_s = time.monotonic()
        try:
            inputs = [caller.x for caller in flight.callers.values()]
            x = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)  # there may be no room
            began_s = time.monotonic()
            output = self._runner.run(x, flight.batch.point, flight.interrupt)
        except Exception as caught:
            error = caught
        return output, error, began_s, time.monotonic() - began_s

    def _finished_elsewhere(
        self,
        batch_id: int,
        output: Floats | None,
        error: Exception | None,
        began_s: float,
        compute_s: float,
    ) -> None:
        flight = self._flights.get(batch_id)
        if flight is None:  # given up as hanging; its thread is nobody's any more
            return
        if flight.watch and flight.worker:
            flight.watch.cancel()
            self._free.append(flight.worker)
        self._finished(batch_id, output, error, began_s, compute_s)
        if self._shares_core:
            self._pump_soon()
        else:
            self._pump()

    def _finished(
        self,
        batch_id: int,
        output: Floats | None,
        error: Exception | None,
        began_s: float,
        compute_s: float,
    ) -> None:
        flight = self._flights.pop(batch_id)
        now = time.monotonic()
        if flight.interrupt and isinstance(error, InterruptedRunError):
            for request in self.scheduler.preempted(batch_id, now):
                self._callers[request.id] = flight.callers[request.id]
            self._on_preemption(compute_s)
        elif output is None:
            failed = self.scheduler.failed(batch_id, now)
            self._tell_log("failed", flight.batch, f": {type(error).__name__}: {error}")
            self._reject(flight, failed, _engine_error("the engine failed"))
        else:
            answered = self.scheduler.done(batch_id, MS * compute_s, now)
            self._on_batch(flight.batch, compute_s)
            self._resolve(flight, answered, output, began_s, compute_s)

    def _resolve(
        self,
        flight: _Flight,
        answered: tuple[Request, ...],
        output: Floats,
        began_s: float,
        compute_s: float,
    ) -> None:
        wanted = {request.id for request in answered}
        start = 0
        for request in flight.batch.requests:
            rows = output[start : start + request.rows]
            start += request.rows
            if request.id in wanted:
                inference = Inference(
                    rows,
                    flight.batch.point,
                    flight.batch.predicted_ms,
                    MS * (began_s - request.arrival_s),
                    MS * compute_s,
                    flight.batch.rows,
                )
                self._tell(flight.callers[request.id], inference)

    def _look(self, batch_id: int) -> None:
        """Give a batch up that hangs, and its thread with it: native code can't be stopped."""
        flight = self._flights[batch_id]
        if flight.began:
            flight.looks += 1
        else:
            flight.waits += 1
        if flight.looks < LOOKS and flight.waits < LOOKS * MOST_WAITS:
            self._watch(flight)
            return
        self._tell_log("did not answer", flight.batch)
        self._free.append(Worker("compute-replacement"))
        self._turns.replace_lock()
        self._give_up_on(flight, _engine_error("the engine did not answer"))
        self._pump()

    def _give_up_on(self, flight: _Flight, error: ServiceError) -> None:
        """Wait no longer for a batch that runs: it ends at its next operator, or when it can."""
        del self._flights[flight.batch.id]
        if flight.watch:
            flight.watch.cancel()
        if flight.interrupt:
            flight.interrupt.set()
        if flight.worker:
            flight.worker.stop()
        self._reject(flight, self.scheduler.failed(flight.batch.id, time.monotonic()), error)

    def _tell_log(self, what: str, batch: Batch, why: str = "") -> None:
        now = time.monotonic()
        if now - self._told_s >= TOLD_S:
            self._told_s = now
            log.error("the engine %s: point %d, %d rows%s", what, batch.point, batch.rows, why)

    def _reject(self, flight: _Flight, requests: tuple[Request, ...], error: ServiceError) -> None:
        for request in requests:
            self._tell(flight.callers[request.id], error)

    def _fail(self, request_id: str, error: ServiceError) -> None:
        caller = self._callers.pop(request_id, None)
        if caller is not None:
            self._tell(caller, error)

    def _tell(self, caller: _Caller, outcome: Inference | ServiceError) -> None:
        try:
            caller.tell(outcome)
        except Exception as error:  # the others of the batch are told all the same
            context = {"message": "an answer could not be given", "exception": error}
            self._loop.call_exception_handler(context)


def _settle(future: asyncio.Future[Inference], outcome: Inference | ServiceError) -> None:
    """Give a future its outcome, unless its client hung up meanwhile."""
    if future.done():
        return
    if isinstance(outcome, ServiceError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _engine_error(what: str) -> UnavailableError:
    return UnavailableError(f"{what}; the server's log says more", reason="engine")


def refused(refusal: Refusal) -> ServiceError:
    """Return the error that tells a client why its request was not taken."""
    if refusal.reason in ("infeasible", "floor"):
        members = (
            {}
            if refusal.min_feasible_ms is None
            else {"min_feasible_ms": math.ceil(1e3 * refusal.min_feasible_ms) / 1e3}  # never less
        )
        return InfeasibleError(refusal.detail, reason=refusal.reason, **members)
    return UnavailableError(refusal.detail, refusal.retry_after_s or 1.0, reason=refusal.reason)
