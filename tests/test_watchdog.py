"""A call that hangs is told of; calls that come back are not, however many there are."""

import threading

from server.watchdog import LOOKS, Watchdog

LOOK_S = 0.1  # where others compute, a thread may wait for its turn for some of it


def test_a_call_that_hangs_is_told_of_once() -> None:
    told = threading.Semaphore(0)
    watchdog = Watchdog(told.release, LOOK_S)
    with watchdog:
        assert told.acquire(timeout=10)
        assert not told.acquire(timeout=3 * LOOKS * LOOK_S)
    watchdog.close()


def test_many_short_calls_and_none_are_not_told_of() -> None:
    told, looked = threading.Event(), threading.Event()
    watchdog = Watchdog(told.set, LOOK_S)
    for _ in range(5 * LOOKS):
        with watchdog:
            looked.wait(LOOK_S / 2)
    looked.wait(3 * LOOKS * LOOK_S)
    watchdog.close()
    assert not told.is_set()


def test_nothing_is_looked_at_once_it_is_closed() -> None:
    told = threading.Event()
    watchdog = Watchdog(told.set, LOOK_S)
    watchdog.close()
    with watchdog:
        assert not told.wait(3 * LOOKS * LOOK_S)
