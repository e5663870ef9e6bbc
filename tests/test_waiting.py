"""Who waits, and who can't be on time any more."""

import pytest

from server.admission import Admission
from server.latencies import Latencies
from server.requests import Request
from server.tables import Tables
from server.waiting import WaitingList


def test_one_that_came_while_the_host_was_slow_hides_nobody_who_is_too_late() -> None:
    times_ms = ((1.0, 2.0), (8.0, 16.0))
    admission = Admission(Tables(Latencies((0.6, 0.8), times_ms, times_ms)), sheds=True)
    waiting = WaitingList()
    for number, (at_s, slowdown) in enumerate([(0.0, 10.0), (0.012, 1.0)]):
        request = Request(str(number), at_s, at_s + 1e-6)  # no point makes that: as soon as may be
        waiting.add(admission.entry(request, (slowdown, slowdown), number, at_s)[0])

    assert [entry.request.id for entry in waiting] == ["0", "1"]
    assert waiting.next_doom_s(1.0) == pytest.approx(0.113)
    assert [entry.request.id for entry in waiting.doomed(0.12, 1.0)] == ["1"]
    assert [entry.request.id for entry in waiting.doomed(0.18, 1.0)] == ["0", "1"]
