"""What serving takes of a host, from the kernel's count of core time."""

import pytest

from benchmarks.demand import Taken, demand, lost
from benchmarks.open_loop import Sent
from benchmarks.own_server import CoreTime

MEAN_MS = 4.0  # of any batch, by the profile


def taken(sent: list[Sent], loop_s: float, others_s: float) -> Taken:
    return Taken.of(sent, CoreTime(loop_s, others_s), lambda *_: MEAN_MS)


def answered(count: int, rows: int, predicted_ms: float = 5.0) -> list[Sent]:
    """`count` requests in batches of so many rows, each of which computed for 2 ms."""
    one = Sent(200, 0.0, compute_ms=2.0, predicted_ms=predicted_ms, rows=rows, point=0)
    return [one] * count


def run_of(request_ms: float, batch_ms: float, rows: list[int]) -> list[Taken]:
    """Return parts of twelve requests each, with so many rows to a batch."""
    loop_s = [12 * (request_ms + batch_ms / each) / 1e3 for each in rows]
    return [taken(answered(12, each), s, 0.024) for each, s in zip(rows, loop_s, strict=True)]


def test_parts_with_larger_batches_tell_what_a_request_takes_from_what_a_batch_does() -> None:
    parts = run_of(0.2, 0.4, [1, 2, 4, 6])

    found = demand(parts, parts)

    assert (found.request_ms, found.batch_ms) == pytest.approx((0.2, 0.4))
    assert found.slower == pytest.approx(4 * 24 / ((12 + 6 + 3 + 2) * MEAN_MS))


def test_runs_alike_tell_how_much_is_for_a_batch_and_the_run_how_much_it_is() -> None:
    alike = run_of(0.2, 0.4, [1, 2, 4, 6])

    found = demand(run_of(0.3, 0.6, [2, 2]), alike)

    assert (found.request_ms, found.batch_ms) == pytest.approx((0.3, 0.6))


def test_what_interrupted_batches_computed_is_no_slower_host() -> None:
    parts = run_of(0.2, 0.4, [1, 2, 4, 6])
    sent = [*answered(12, rows=2), Sent(503, 0.0)]  # six batches of 2 ms

    share = lost(sent, interrupted_ms=3.0)

    assert share == pytest.approx(3 / 15)
    assert demand(parts, parts, share).slower == pytest.approx(0.8 * demand(parts, parts).slower)
    assert lost([], interrupted_ms=0.0) == 0
    assert lost([], interrupted_ms=3.0) == 1


def test_what_the_event_loop_computed_itself_is_computing() -> None:
    inline = taken(answered(10, rows=1, predicted_ms=0.1), loop_s=0.026, others_s=0.0)

    assert inline.loop_ms == pytest.approx(6.0)
    assert inline.computed_ms == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("batch_ms", "expected"),
    [
        pytest.param(-0.1, (0.15, 0.0), id="more for fewer batches"),
        pytest.param(5.0, (0.0, 4.8), id="less for more requests"),
    ],
)
def test_neither_is_below_nothing_and_both_add_up(
    batch_ms: float, expected: tuple[float, float]
) -> None:
    request_ms = 0.2 if batch_ms < 0 else -0.1
    parts = run_of(request_ms, batch_ms, [2, 2, 2]) + run_of(request_ms, batch_ms, [2, 4])[1:]

    found = demand(parts[:3], parts)

    assert (found.request_ms, found.batch_ms) == pytest.approx(expected)


def test_requests_that_were_all_refused_take_no_batch() -> None:
    refused = [taken([Sent(503, 0.0)] * 10, loop_s=0.001, others_s=0.0)]

    found = demand(refused, refused)

    assert (found.request_ms, found.batch_ms, found.slower) == pytest.approx((0.1, 0.0, 1.0))


def test_nothing_taken_is_nothing_demanded() -> None:
    nothing = [taken([], loop_s=0.0, others_s=0.0)]

    found = demand(nothing, nothing)

    assert (found.request_ms, found.batch_ms, found.slower) == (0.0, 0.0, 1.0)
