"""Turns: trials keep out of the way of requests."""

from server.worker import Turns


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_without_requests_trials_follow_each_other() -> None:
    assert Turns(Clock()).pause_s(0.5) == 0


def test_while_requests_come_in_trials_take_a_tenth_of_the_time() -> None:
    clock = Clock()
    turns = Turns(clock)

    turns.set_idle(False)
    turns.set_idle(True)

    clock.now_s = Turns.TRAFFIC_S / 2
    assert 0.02 / (0.02 + turns.pause_s(0.02)) == Turns.TRIAL_SHARE
    assert turns.pause_s(60.0) == Turns.PATIENCE_S
    clock.now_s = Turns.TRAFFIC_S * 2
    assert turns.pause_s(0.02) == 0


def test_a_trial_excludes_a_batch() -> None:
    turns = Turns(Clock())

    with turns.trial(0.0):
        assert not turns.computing.acquire(blocking=False)
    assert turns.computing.acquire(blocking=False)
