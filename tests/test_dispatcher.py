"""The event loop around the scheduler, with a fake engine that answers when it is told to."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from server import dispatcher as dispatcher_module
from server.answers import Inference
from server.dispatcher import Dispatcher
from server.errors import InfeasibleError, InvalidError, OutOfTimeError, UnavailableError
from server.interrupt import Interrupt, InterruptedRunError
from server.latencies import Latencies
from server.requests import Request
from server.scheduler import Scheduler
from server.worker import Turns

Floats = NDArray[np.float32]
LATENCIES = Latencies((0.8, 0.9), ((1.0,) * 4, (5.0,) * 4), ((2.0,) * 4, (10.0,) * 4))


class FakeEngine:
    """Returns its input plus the point, once the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.ran: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self.interrupted = threading.Event()

    def run(self, batch: Floats, point: int, interrupt: Interrupt | None = None) -> Floats:
        gate = self.gate
        self.ran.append((len(batch), point))
        while not gate.wait(0.001):
            if interrupt and interrupt.is_set:
                self.interrupted.set()
                raise InterruptedRunError
        if self.error:
            raise self.error
        return batch + np.float32(point)


def rows(value: float, n: int = 1) -> Floats:
    return np.full((n, 2), value, np.float32)


def drive(
    scenario: Callable[[Dispatcher, FakeEngine], Coroutine[Any, Any, None]],
    max_queue: int = 8,
    turns: Turns | None = None,
    preempts: bool = False,
    latencies: Latencies = LATENCIES,
) -> None:
    """Run a scenario on a fresh dispatcher; nothing is left running after it."""

    async def main() -> None:
        engine = FakeEngine()
        scheduler = Scheduler(latencies, max_queue=max_queue, preempts=preempts)
        driver = Dispatcher(scheduler, engine, turns or Turns())
        try:
            async with asyncio.timeout(30):
                await scenario(driver, engine)
        finally:
            engine.gate.set()
            driver.close()

    asyncio.run(main())


def request(name: str, target_s: float | None = None, n: int = 1, **fields: Any) -> Request:
    now = time.monotonic()
    return Request(name, now, None if target_s is None else now + target_s, rows=n, **fields)


async def start(driver: Dispatcher, wanted: Request, value: float) -> "asyncio.Task[Inference]":
    task = asyncio.create_task(driver.infer(wanted, rows(value, wanted.rows)))
    await asyncio.sleep(0)  # it is taken
    await asyncio.sleep(0)  # it is planned for
    return task


def test_an_idle_server_answers_from_the_most_accurate_point() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        inference = await driver.infer(request("a"), rows(3))

        np.testing.assert_array_equal(inference.output, rows(4))
        assert (inference.point, inference.batch_size) == (1, 1)
        assert inference.queue_ms >= 0
        assert inference.compute_ms >= 0
        assert engine.ran == [(1, 1)]

    drive(scenario)


def test_a_decision_is_counted_where_something_waits() -> None:
    async def scenario(driver: Dispatcher, _engine: FakeEngine) -> None:
        decisions: list[float] = []
        driver._on_decision = decisions.append
        for name in ("a", "b"):
            await driver.infer(request(name), rows(0))
        await asyncio.sleep(0.01)

        assert len(decisions) == 2

    drive(scenario)


def test_each_of_a_batch_gets_its_own_rows() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        engine.gate.clear()
        first = await start(driver, request("first"), 0)
        tasks = [await start(driver, request(f"r{i}", n=1 + i % 2), 10 * i) for i in range(3)]
        engine.gate.set()

        answers = [await task for task in (first, *tasks)]

        assert engine.ran == [(1, 1), (4, 1)]
        for i, answer in enumerate(answers[1:]):
            np.testing.assert_array_equal(answer.output, rows(10 * i + 1, 1 + i % 2))

    drive(scenario)


def test_answers_go_out_before_the_next_batch_takes_the_core() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        loop, order = asyncio.get_running_loop(), list[int]()

        def write(_: object) -> None:  # transports write at the end of a turn, or in the next
            loop.call_soon(lambda: order.append(len(engine.ran)))

        engine.gate.clear()
        driver.begin(request("first"), rows(0), write)
        await asyncio.sleep(0)  # it runs
        second = asyncio.create_task(driver.infer(request("second"), rows(0)))
        await asyncio.sleep(0)
        engine.gate.set()

        await second

        assert order == [1]
        assert len(engine.ran) == 2

    drive(scenario)


def test_who_cannot_be_told_does_not_keep_the_others_of_a_batch_from_it() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        said: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))

        def broken(_: object) -> None:
            raise OSError("the connection is gone")

        driver.begin(request("broken"), rows(1), broken)
        answer = await driver.infer(request("other"), rows(2))

        np.testing.assert_array_equal(answer.output, rows(3))
        assert engine.ran == [(2, 1)]
        assert [str(context["exception"]) for context in said] == ["the connection is gone"]

    drive(scenario)


def test_those_that_come_in_one_turn_of_the_loop_share_a_batch() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        await asyncio.gather(*(driver.infer(request(f"r{i}"), rows(i)) for i in range(4)))

        assert engine.ran == [(4, 1)]

    drive(scenario)


def test_a_request_that_runs_out_of_time_is_told_so_and_not_run() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        engine.gate.clear()
        first = await start(driver, request("first"), 0)
        late = await start(driver, request("late", 0.02), 1)
        with pytest.raises(OutOfTimeError) as told:
            await late
        assert told.value.members == {"reason": "expired"}
        engine.gate.set()
        await first

        assert engine.ran == [(1, 1)]

    drive(scenario)


def test_an_infeasible_target_is_refused_at_once_when_asked() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        with pytest.raises(InfeasibleError) as caught:
            await driver.infer(request("a", 0.001, on_miss="reject"), rows(0))

        assert caught.value.members["reason"] == "infeasible"
        assert 2.0 <= caught.value.members["min_feasible_ms"] < 1000.0
        assert engine.ran == []

    drive(scenario)


def test_a_full_queue_says_when_to_come_back() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        engine.gate.clear()
        tasks = [await start(driver, request(name), 0) for name in ("a", "b")]
        with pytest.raises(UnavailableError) as caught:
            await driver.infer(request("c"), rows(0))
        engine.gate.set()
        await asyncio.gather(*tasks)

        assert int(caught.value.headers()["Retry-After"]) >= 1

    drive(scenario, max_queue=1)


def test_too_many_rows_are_refused_with_the_limit() -> None:
    async def scenario(driver: Dispatcher, _engine: FakeEngine) -> None:
        with pytest.raises(InvalidError, match=r"1\.\.4 samples, not 5"):
            await driver.infer(request("a", n=5), rows(0, 5))

    drive(scenario)


def test_an_engine_that_raises_fails_its_batch_only(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        engine.error = RuntimeError("out of memory")
        for name in ("a", "b"):
            with pytest.raises(UnavailableError, match="the engine failed; the server's log") as e:
                await driver.infer(request(name), rows(0))
            assert e.value.members["reason"] == "engine"
        engine.error = None

        np.testing.assert_array_equal((await driver.infer(request("c"), rows(0))).output, rows(1))

    drive(scenario)
    assert caplog.messages == ["the engine failed: point 1, 1 rows: RuntimeError: out of memory"], (
        "not at every batch"
    )


def test_a_batch_that_cannot_be_put_together_fails_alone() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        one = driver.infer(request("one"), rows(1))
        other = driver.infer(request("other"), np.zeros((1, 3), np.float32))

        for failed in await asyncio.gather(one, other, return_exceptions=True):
            assert isinstance(failed, UnavailableError)
        np.testing.assert_array_equal(
            (await driver.infer(request("next"), rows(3))).output, rows(4)
        )
        assert engine.ran == [(1, 1)]

    drive(scenario)


@pytest.fixture
def hang_s(monkeypatch: pytest.MonkeyPatch) -> float:
    """Return after how many seconds a batch is taken to hang."""
    monkeypatch.setattr(dispatcher_module, "HANG_MIN_S", 0.2)
    monkeypatch.setattr(dispatcher_module, "HANG_FACTOR", 1.0)
    return 0.2


@pytest.mark.usefixtures("hang_s")
def test_an_engine_that_hangs_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        hanging = engine.gate = threading.Event()
        with pytest.raises(UnavailableError, match="the engine did not answer"):
            await driver.infer(request("a"), rows(0))
        engine.gate = threading.Event()
        engine.gate.set()

        np.testing.assert_array_equal((await driver.infer(request("b"), rows(0))).output, rows(1))
        hanging.set()

    drive(scenario)
    assert caplog.messages == ["the engine did not answer: point 1, 1 rows"]


@pytest.mark.usefixtures("hang_s")
def test_a_batch_that_is_given_up_is_interrupted() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        engine.gate.clear()
        with pytest.raises(UnavailableError, match="the engine did not answer"):
            await driver.infer(request("a"), rows(0))

        assert await asyncio.to_thread(engine.interrupted.wait, 5)

    drive(scenario, preempts=True)


def test_a_process_that_was_stopped_for_a_while_goes_on(hang_s: float) -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        engine.gate.clear()
        answer = await start(driver, request("a"), 0)
        time.sleep(2 * hang_s)  # all of the process stands still
        await asyncio.sleep(0)
        engine.gate.set()

        np.testing.assert_array_equal((await answer).output, rows(1))

    drive(scenario)


SLOW = Latencies((0.8, 0.9), ((100.0,) * 4, (2000.0,) * 4), ((150.0,) * 4, (3000.0,) * 4))


def test_a_batch_is_interrupted_for_one_that_would_be_late_and_answered_after_it() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        preemptions: list[float] = []
        driver._on_preemption = preemptions.append
        engine.gate.clear()
        bulk = await start(driver, request("bulk", n=4), 10)
        tight = await start(driver, request("tight", 1.5), 20)
        while len(engine.ran) < 2:
            await asyncio.sleep(0.001)
        engine.gate.set()

        first = await tight
        assert not bulk.done()
        np.testing.assert_array_equal(first.output, rows(20 + first.point))
        np.testing.assert_array_equal((await bulk).output, rows(11, 4))
        assert engine.ran == [(4, 1), (1, 0), (4, 1)]
        assert len(preemptions) == 1

    drive(scenario, preempts=True, latencies=SLOW)


def test_who_hangs_up_while_the_batch_stops_is_not_computed_again() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        engine.gate.clear()
        bulk = await start(driver, request("bulk", n=4), 10)
        tight = await start(driver, request("tight", 1.5), 20)
        bulk.cancel()
        while len(engine.ran) < 2:
            await asyncio.sleep(0.001)
        engine.gate.set()

        np.testing.assert_array_equal((await tight).output, rows(20))
        assert driver.scheduler.is_idle
        assert engine.ran == [(4, 1), (1, 0)]

    drive(scenario, preempts=True, latencies=SLOW)


def test_an_engine_that_hangs_on_the_event_loop_ends_the_process() -> None:
    program = """
import asyncio, threading, time
import numpy as np
from server.dispatcher import Dispatcher
from server.latencies import Latencies
from server.requests import Request
from server.scheduler import Scheduler
from server.worker import Turns

class Hangs:
    def run(self, batch, point, interrupt):
        threading.Event().wait()

async def main():
    scheduler = Scheduler(Latencies((0.8,), ((0.1,),), ((0.2,),)))
    driver = Dispatcher(scheduler, Hangs(), Turns())
    await driver.infer(Request("a", time.monotonic()), np.zeros((1, 2), np.float32))

asyncio.run(main())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )

    assert (run.returncode, run.stderr) == (
        70,
        "the engine did not answer the event loop: this process ends\n",
    )


def test_a_batch_that_waits_for_a_trial_does_not_hang(hang_s: float) -> None:
    turns = Turns()

    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        engine.gate.clear()
        with turns.computing:  # as a trial does
            answer = await start(driver, request("a"), 0)
            await asyncio.sleep(1.9 * hang_s)
        await asyncio.sleep(0.3 * hang_s)  # it computes, and is looked at
        engine.gate.set()

        np.testing.assert_array_equal((await answer).output, rows(1))

    drive(scenario, turns=turns)


@pytest.mark.usefixtures("hang_s")
def test_a_trial_that_hangs_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "MOST_WAITS", 1)
    turns = Turns()

    async def scenario(driver: Dispatcher, _engine: FakeEngine) -> None:
        with turns.computing:
            with pytest.raises(UnavailableError, match="the engine did not answer"):
                await driver.infer(request("a"), rows(0))

            answer = await driver.infer(request("b"), rows(0))
            np.testing.assert_array_equal(answer.output, rows(1))

    drive(scenario, turns=turns)


def test_a_client_that_hangs_up_frees_its_place() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        engine.gate.clear()
        first = await start(driver, request("first"), 0)
        with pytest.raises(ClientDisconnect):
            await driver.infer(request("gone"), rows(0), receive)
        assert driver.scheduler.waiting == 0
        engine.gate.set()
        await first

        assert engine.ran == [(1, 1)]

    drive(scenario)


def test_draining_answers_what_was_taken_and_refuses_the_rest() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        engine.gate.clear()
        tasks = [await start(driver, request(name), 0) for name in ("a", "b")]
        drained = asyncio.create_task(driver.drain(10))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="shutting down"):
            await driver.infer(request("c"), rows(0))
        engine.gate.set()
        await drained

        assert all(task.done() for task in tasks)

    drive(scenario)


def test_a_drain_that_takes_too_long_tells_those_that_wait_and_those_that_run() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        engine.gate.clear()
        tasks = [await start(driver, request(name), 0) for name in ("runs", "waits")]
        await driver.drain(0.01)

        for task in tasks:
            with pytest.raises(UnavailableError, match="shutting down"):
                await task
        assert driver.scheduler.is_idle

    drive(scenario)


def test_a_request_interrupts_a_trial_and_a_batch_waits_for_its_end() -> None:
    async def scenario(driver: Dispatcher, engine: FakeEngine) -> None:
        turns = driver._turns
        with turns.trial(0.01) as interrupt:
            assert not interrupt.is_set
            task = await start(driver, request("a"), 0)
            assert interrupt.is_set
            assert engine.ran == []
        await task

        assert engine.ran == [(1, 1)]

    drive(scenario)
