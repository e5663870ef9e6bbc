"""Turns: trials keep out of the way of requests."""

import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import networks
from server.engine import Engine
from server.interrupt import InterruptedRunError
from server.worker import Turns


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_without_requests_trials_follow_each_other() -> None:
    assert Turns(Clock()).pause_s(0.5) == 0


def test_while_requests_come_in_trials_take_half_of_the_time() -> None:
    clock = Clock()
    turns = Turns(clock)

    turns.set_idle(False)
    turns.set_idle(True)

    clock.now_s = Turns.TRAFFIC_S / 2
    assert 0.02 / (0.02 + turns.pause_s(0.02)) == Turns.TRIAL_SHARE
    assert turns.pause_s(60.0) == Turns.LONGEST_PAUSE_S
    clock.now_s = Turns.TRAFFIC_S * 2
    assert turns.pause_s(0.02) == 0


def test_a_request_interrupts_a_trial_but_not_forever() -> None:
    clock = Clock()
    turns = Turns(clock)

    def is_interrupted() -> bool:
        with turns.trial(0.0) as interrupt:
            assert not interrupt.is_set
            turns.set_idle(False)
            found = interrupt.is_set
        turns.set_idle(True)
        return found

    for _ in range(2):
        for _ in range(3):
            assert is_interrupted()
        clock.now_s += Turns.PATIENCE_S
        assert not is_interrupted()  # the next may be, again


def test_longer_trials_give_way_for_longer_but_no_longer_than_they_may() -> None:
    clock = Clock()
    turns = Turns(clock)

    def gives_way(after_s: float, most_s: float = math.inf) -> bool:
        turns.set_idle(True)
        with turns.trial(0.01) as interrupt:
            turns.set_idle(False)
            assert interrupt.is_set  # so it was tried since now
        turns.set_idle(True)
        clock.now_s += after_s
        with turns.trial(0.01, most_s) as interrupt:
            turns.set_idle(False)
            found = interrupt.is_set
        turns.set_idle(True)
        with turns.trial(0.01):
            pass
        return found

    worth_s = 0.01 / Turns.UNYIELDING_SHARE
    assert gives_way(0.99 * worth_s)
    assert not gives_way(1.01 * worth_s)
    assert gives_way(0.19, most_s=0.2)
    assert not gives_way(0.21, most_s=0.2)


def test_one_that_gives_way_for_long_looks_up_in_between() -> None:
    turns = Turns()
    turns.set_idle(False)
    began_s = time.monotonic()

    with turns.trial(0.2) as interrupt:
        assert interrupt.is_set

    assert time.monotonic() - began_s < 0.2 / Turns.UNYIELDING_SHARE / 2


def test_a_trial_that_found_no_idle_moment_runs_to_its_end() -> None:
    turns = Turns()
    turns.PATIENCE_S = 0.01

    turns.set_idle(False)
    with turns.trial(0.0) as interrupt:
        turns.set_idle(True)
        turns.set_idle(False)
        assert not interrupt.is_set


def test_a_request_interrupts_a_run_of_the_engine(tmp_path: Path) -> None:
    network = networks.resnet18()
    engine = Engine(network.save(tmp_path / "net.maestro", [network.uniform(1.0)]))
    turns = Turns()
    x = np.ones((16, *engine.artifact.manifest.input.shape[1:]), np.float32)
    began_s = time.monotonic()
    expected = engine.run(x, 0)
    alone_s = time.monotonic() - began_s

    request = threading.Timer(alone_s / 4, turns.set_idle, [False])
    with turns.trial(0.0) as interrupt:
        request.start()
        with pytest.raises(InterruptedRunError):
            engine.run(x, 0, interrupt)
    request.join()

    np.testing.assert_array_equal(engine.run(x, 0), expected)


def test_it_is_quiet_once_no_request_came_for_long_and_nothing_computes() -> None:
    clock = Clock()
    turns = Turns(clock)
    assert turns.is_quiet(1.0)

    turns.note_request()
    clock.now_s += 0.5
    assert not turns.is_quiet(1.0)

    clock.now_s += 0.5
    assert turns.is_quiet(1.0)
    with turns.computing:
        assert not turns.is_quiet(1.0)


def test_a_trial_excludes_a_batch() -> None:
    turns = Turns(Clock())

    with turns.trial(0.0):
        assert not turns.computing.acquire(blocking=False)
    assert turns.computing.acquire(blocking=False)
