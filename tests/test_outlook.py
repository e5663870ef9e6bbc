"""What a batch does to everyone else, against a plain statement of the same."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.forecast import Envelope
from server.latencies import Latencies
from server.outlook import (
    Expected,
    View,
    burst_limits_ms,
    due_by_place,
    due_with_bursts,
    limits_behind_ms,
)
from server.requests import Request
from server.tables import MS, Tables
from server.waiting import Entry, WaitingList

ROWS = range(1, 7)
TABLES = Tables(
    Latencies(
        (0.6, 0.7),
        tuple(tuple(ms * (1 + rows) / 2 for rows in ROWS) for ms in (1.0, 3.0)),
        tuple(tuple(1.2 * ms * (1 + rows) / 2 for rows in ROWS) for ms in (1.0, 3.0)),
        0.25,
    )
)
SIZES = (1, 2, 4, 6)
WINDOWS_MS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

DUES_MS = st.lists(st.floats(1.0, 200.0), min_size=2, max_size=40).map(sorted)
CURVES = st.lists(
    st.tuples(
        st.floats(5.0, 100.0),
        st.lists(st.floats(0.0, 30.0), min_size=7, max_size=7).map(sorted),
    ),
    max_size=3,
    unique_by=lambda curve: curve[0],
).map(sorted)
SPEEDS = st.floats(0.7, 2.0)

Curves = list[tuple[float, list[float]]]


def make_view(dues_ms: list[float], curves: Curves, speed: float, slots: int = 1) -> View:
    waiting = WaitingList()
    for i, due_ms in enumerate(dues_ms):
        due_s = due_ms / MS
        request = Request(str(i), 0.0, due_s)
        waiting.add(Entry(request, (due_s, 2, i), due_s, 0, 1, 0.0, TABLES.unit_ms[0], 1.0))
    envelopes = [Envelope(target_ms, bursts) for target_ms, bursts in curves]
    expected = Expected(100.0, WINDOWS_MS, envelopes, 0.9)
    return View(0.0, waiting, TABLES, 1.1 * speed, speed, slots, 0, expected)


def rows_before(view: View, due_ms: float) -> float:
    """Return the rows that may come yet and be due before: of each class what is its own."""
    total, tighter = 0.0, [0.0] * 8
    for envelope in view.expected.envelopes:
        bursts = [0.0, *(0.9 * burst for burst in envelope.bursts)]
        own = [max(0.0, a - b) for a, b in zip(bursts, tighter, strict=True)]
        total += linear(due_ms + TABLES.overhead_ms - envelope.target_ms, own)
        tighter = bursts
    return total


def linear(span_ms: float, bursts: list[float]) -> float:
    spans_ms = [0.0, *WINDOWS_MS]
    if span_ms <= 0 or span_ms >= spans_ms[-1]:
        return bursts[0] if span_ms <= 0 else bursts[-1]
    right = next(j for j, known_ms in enumerate(spans_ms) if known_ms > span_ms)
    share = (span_ms - spans_ms[right - 1]) / (spans_ms[right] - spans_ms[right - 1])
    return bursts[right - 1] + share * (bursts[right] - bursts[right - 1])


@given(DUES_MS, CURVES, SPEEDS, st.integers(1, 2))
def test_those_behind_limit_a_batch_as_batches_of_the_best_size_have_it(
    dues_ms: list[float], curves: Curves, speed: float, slots: int
) -> None:
    view = make_view(dues_ms, curves, speed, slots)
    due = due_by_place(view)
    counts = [count for count in ROWS if count <= len(dues_ms)]
    blocks = list(zip(due.firsts, due.firsts[1:], strict=False))

    def limit_ms(count: int, size: int) -> float:
        took_ms = speed * (1 + size) / 2
        tail_ms = 1.1 * speed * 1.2 * (1 + size) / 2
        return min(
            (
                dues_ms[first]
                - took_ms / size / slots * (end - 1 - count + rows_before(view, dues_ms[first]))
                - tail_ms
                for first, end in blocks
                if first >= count
            ),
            default=math.inf,
        )

    found = limits_behind_ms(view, due_with_bursts(view, due), counts)

    assert found == pytest.approx([max(limit_ms(c, size) for size in SIZES) for c in counts])


@given(DUES_MS, CURVES, SPEEDS, st.lists(st.floats(1.0, 100.0), min_size=6, max_size=6))
def test_a_burst_limits_a_batch_by_the_window_that_is_hardest_to_meet(
    dues_ms: list[float], curves: Curves, speed: float, limits_ms: list[float]
) -> None:
    view = make_view(dues_ms, curves, speed)

    def limit_ms(rows: int) -> float:
        limit_ms = math.inf
        for envelope in view.expected.envelopes:
            target_ms = envelope.target_ms - TABLES.overhead_ms
            left = max(0.999, sum(due_ms < target_ms for due_ms in dues_ms) + 0.999 - rows)
            for window_ms, burst in zip(WINDOWS_MS, envelope.bursts, strict=True):
                if 0.9 * burst >= 0.5:
                    drained_ms = speed * TABLES.drains_ms[int(left + 0.9 * burst)]
                    limit_ms = min(limit_ms, target_ms + window_ms - drained_ms)
        return limit_ms

    found = burst_limits_ms(view, ROWS, limits_ms)

    assert found == pytest.approx(
        [min(own_ms, limit_ms(rows)) for rows, own_ms in zip(ROWS, limits_ms, strict=True)]
    )
