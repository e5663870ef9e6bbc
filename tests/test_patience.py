"""One timer for many waits: each ends when it is due, and not before."""

from collections.abc import Callable
from typing import Any

from server.patience import Patience


class Clock:
    """A loop's time and its timers."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, due_s: float, call: Callable[..., None], *given: Any) -> None:
        self.timers.append((due_s, call, given))

    def go_to(self, now: float) -> None:
        while self.timers and min(self.timers)[0] <= now:
            due = min(self.timers)
            self.timers.remove(due)
            self.now = max(self.now, due[0])
            due[1](*due[2])
        self.now = now


def waited_for() -> tuple[Any, Patience[str], list[tuple[float, str]]]:
    clock = Clock()
    due: list[tuple[float, str]] = []
    return clock, Patience(5.0, lambda one: due.append((clock.now, one))), due


def test_waits_that_take_too_long_end_in_their_order_and_the_others_do_not() -> None:
    clock, patience, due = waited_for()
    for now, one in ((100.0, "first"), (101.0, "answered"), (102.0, "second")):
        clock.go_to(now)
        patience.begin(one, clock)
    patience.end("answered")
    patience.end("never here")

    clock.go_to(104.9)
    assert (due, patience.first) == ([], "first")
    clock.go_to(106.9)
    assert (due, patience.first) == ([(105.0, "first")], "second")
    clock.go_to(200.0)
    assert (due, patience.first) == ([(105.0, "first"), (107.0, "second")], None)
    assert clock.timers == []


def test_a_wait_counts_from_its_own_begin() -> None:
    clock, patience, due = waited_for()
    patience.begin("one", clock)
    clock.go_to(103.0)
    patience.begin("one", clock)  # it is waited for already
    patience.end("one")
    clock.go_to(104.0)
    patience.begin("one", clock)
    clock.go_to(108.9)
    assert due == []
    clock.go_to(300.0)
    patience.begin("one", clock)  # the timer starts anew
    clock.go_to(400.0)
    assert due == [(109.0, "one"), (305.0, "one")]


def test_one_timer_runs_at_a_time() -> None:
    clock, patience, _ = waited_for()
    for i in range(100):
        clock.go_to(100.0 + i / 100)
        patience.begin(str(i), clock)
        patience.end(str(i - 1))
        assert len(clock.timers) == 1
