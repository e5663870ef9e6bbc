"""When to interrupt the batch that runs, one condition at a time.

A row takes 1 ms alone and 3.5 / 6 ms in a full batch; tails are 1.32 times that.
"""

from server.preemption import Remaining, delays, pays
from tests.test_outlook import make_view

SOON_AGAIN = Remaining(usual_ms=12.0, stop_ms=0.5, again_ms=3.0)
LONG_AGAIN = Remaining(usual_ms=12.0, stop_ms=0.5, again_ms=20.0)
TWELVE_AT_ONCE = [12.0] * 7


def test_a_batch_is_in_the_way_of_one_whom_a_burst_may_go_before() -> None:
    # Due in 21 ms; with a burst that is due just before, to be begun within 11. The burst
    # by itself is in time behind 14.
    assert delays(make_view([21.0], [(20.0, TWELVE_AT_ONCE)], 1.0), SOON_AGAIN)
    assert not delays(make_view([21.0], [], 1.0), SOON_AGAIN)


def test_a_batch_is_in_the_way_of_a_burst_that_leaves_those_who_wait_in_time() -> None:
    assert delays(make_view([100.0], [(15.0, TWELVE_AT_ONCE)], 1.0), SOON_AGAIN)
    assert not delays(make_view([100.0], [(25.0, TWELVE_AT_ONCE)], 1.0), SOON_AGAIN)


def test_no_burst_counts_where_computing_again_takes_longer_than_the_rest() -> None:
    assert not delays(make_view([21.0], [(20.0, TWELVE_AT_ONCE)], 1.0), LONG_AGAIN)
    assert delays(make_view([13.0], [], 1.0), LONG_AGAIN)


def test_interrupting_does_not_pay_where_somebody_is_late_until_the_batch_stops() -> None:
    assert not pays(make_view([1.7], [], 1.0), SOON_AGAIN)  # 1.32 of them to compute
    assert pays(make_view([1.9], [], 1.0), SOON_AGAIN)


def test_work_is_added_only_where_the_cheapest_point_carries_the_load_well() -> None:
    crowded, roomy = (make_view([50.0] * rows, [], 1.0) for rows in (73, 60))

    assert pays(crowded, SOON_AGAIN)  # 84 % of what it gets through, and all in time
    assert not pays(crowded, LONG_AGAIN)
    assert pays(roomy, LONG_AGAIN)  # 69 %
