"""What serving takes of a host, from the kernel's count of core time."""

import pytest

from benchmarks.demand import Taken, demand
from benchmarks.open_loop import Sent
from benchmarks.own_server import CoreTime

MEAN_MS = 4.0  # of any batch, by the profile


def taken(sent: list[Sent], loop_s: float, others_s: float) -> Taken:
    return Taken.of(sent, CoreTime(loop_s, others_s), lambda *_: MEAN_MS)


def answered(count: int, rows: int, predicted_ms: float = 5.0) -> list[Sent]:
    """`count` requests in batches of so many rows, each of which computed for 2 ms."""
    one = Sent(200, 0.0, compute_ms=2.0, predicted_ms=predicted_ms, rows=rows, point=0)
    return [one] * count


def test_lone_requests_tell_what_a_batch_takes_from_what_a_request_does() -> None:
    # A request takes 0.2 ms and a batch 0.4: sixteen in four batches, and ten alone.
    shared = taken(answered(16, rows=4), loop_s=(16 * 0.2 + 4 * 0.4) / 1e3, others_s=0.024)
    lone = taken(answered(10, rows=1), loop_s=10 * 0.6 / 1e3, others_s=0.04)

    found = demand(shared, lone)

    assert (found.request_ms, found.batch_ms) == pytest.approx((0.2, 0.4))
    assert found.slower == pytest.approx(24 / (4 * MEAN_MS))
    assert lone.slower == pytest.approx(1.0)


def test_what_the_event_loop_computed_itself_is_computing() -> None:
    inline = taken(answered(10, rows=1, predicted_ms=0.1), loop_s=0.026, others_s=0.0)

    assert inline.loop_ms == pytest.approx(6.0)
    assert inline.computed_ms == pytest.approx(20.0)


@pytest.mark.parametrize(("lone_ms", "request_ms", "batch_ms"), [(0.1, 0.3, 0.0), (99, 0.0, 1.2)])
def test_neither_is_below_nothing_and_both_add_up(
    lone_ms: float, request_ms: float, batch_ms: float
) -> None:
    shared = taken(answered(16, rows=4), loop_s=16 * 0.3 / 1e3, others_s=0.0)
    lone = taken(answered(10, rows=1), loop_s=10 * lone_ms / 1e3, others_s=0.0)

    found = demand(shared, lone)

    assert (found.request_ms, found.batch_ms) == pytest.approx((request_ms, batch_ms))


def test_requests_that_were_all_refused_take_no_batch() -> None:
    refused = taken([Sent(503, 0.0)] * 10, loop_s=0.001, others_s=0.0)
    lone = taken(answered(10, rows=1), loop_s=0.006, others_s=0.0)

    found = demand(refused, lone)

    assert (found.request_ms, found.batch_ms, found.slower) == pytest.approx((0.1, 0.0, 1.0))
