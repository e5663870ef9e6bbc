"""The calibration job: one at a time, progress, cancel, failure, storing; and a real profile."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.effort import QUICK, CancelledError, Effort, Precision, Progress
from benchmarks.profiler import batch_sizes_to, profile
from maestro_core.artifact import Artifact
from maestro_core.profile import Profile
from maestro_core.profile_store import ProfileStore
from server.calibration import (
    AlreadyRunningError,
    Calibrator,
    OwnCalibrations,
    UnknownJobError,
)
from server.engine import Engine
from server.measuring import latencies_of
from tests.test_profile import PROFILE


class FakeMeasure:
    """Reports progress, then waits to be let go or cancelled."""

    def __init__(self) -> None:
        self.started, self.let_go = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def __call__(
        self,
        effort: Effort,
        progress: Callable[[Progress], object],
        cancelled: Callable[[], bool],
    ) -> Profile:
        progress(Progress(3, 9, effort.budget_s / 2))
        self.started.set()
        while not self.let_go.wait(0.001):
            if cancelled():
                raise CancelledError
        if self.error:
            raise self.error
        return PROFILE


@pytest.fixture
def measure() -> Iterator[FakeMeasure]:
    fake = FakeMeasure()
    yield fake
    fake.let_go.set()


def test_a_calibration_that_gets_no_thread_is_not_under_way(
    measure: FakeMeasure, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrator = Calibrator(measure, lambda _: None, None)

    def no_more(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", no_more)
        with pytest.raises(RuntimeError):
            calibrator.start(QUICK)

    assert calibrator.start(QUICK).state == "running"


def test_a_job_reports_progress_and_hands_its_profile_over(
    measure: FakeMeasure, tmp_path: Path
) -> None:
    seen: list[Profile] = []
    store = ProfileStore(tmp_path)
    calibrator = Calibrator(measure, seen.append, store)

    job = calibrator.start(QUICK)
    measure.started.wait()
    running = calibrator.job(job.id)
    measure.let_go.set()
    calibrator.wait()

    assert (running.state, running.done, running.total) == ("running", 3, 9)
    assert running.seconds_left == QUICK.budget_s / 2
    assert calibrator.job(job.id).state == "done"
    assert seen == [PROFILE]
    assert store.find(PROFILE.key).profile == PROFILE


def test_a_second_start_is_refused_until_the_first_has_ended(measure: FakeMeasure) -> None:
    calibrator = Calibrator(measure, lambda _: None, None)
    first = calibrator.start(QUICK)

    with pytest.raises(AlreadyRunningError, match=first.id):
        calibrator.start(QUICK)
    measure.let_go.set()
    calibrator.wait()
    second = calibrator.start(QUICK)
    calibrator.wait()

    assert second.id != first.id
    assert calibrator.job(second.id).state == "done"


def test_a_cancelled_job_hands_nothing_over(measure: FakeMeasure, tmp_path: Path) -> None:
    seen: list[Profile] = []
    calibrator = Calibrator(measure, seen.append, ProfileStore(tmp_path))

    job = calibrator.start(QUICK)
    calibrator.cancel(job.id)
    calibrator.wait()

    assert calibrator.job(job.id).state == "cancelled"
    assert seen == []
    assert list(tmp_path.iterdir()) == []


def test_cancelling_a_job_that_has_ended_leaves_it_done(measure: FakeMeasure) -> None:
    calibrator = Calibrator(measure, lambda _: None, None)
    measure.let_go.set()
    job = calibrator.start(QUICK)
    calibrator.wait()

    assert calibrator.cancel(job.id).state == "done"
    assert calibrator.job(job.id).state == "done"


def test_a_failure_is_told_and_logged(
    measure: FakeMeasure, caplog: pytest.LogCaptureFixture
) -> None:
    calibrator = Calibrator(measure, lambda _: None, None)
    measure.error = RuntimeError("no such kernel")
    measure.let_go.set()

    job = calibrator.start(QUICK)
    calibrator.wait()

    ended = calibrator.job(job.id)
    assert (ended.state, ended.error) == ("failed", "RuntimeError: no such kernel")
    assert caplog.messages == ["quick calibration failed: RuntimeError: no such kernel"]


def test_waiting_while_one_starts_is_safe(measure: FakeMeasure) -> None:
    calibrator = Calibrator(measure, lambda _: None, None)
    measure.let_go.set()
    over = threading.Event()
    errors = list[Exception]()

    def wait() -> None:
        try:
            while not over.is_set():
                calibrator.wait()
        except Exception as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    for _ in range(300):
        calibrator.start(QUICK)
        calibrator.wait()
    over.set()
    waiting.join()

    assert errors == []


def test_the_last_of_many_calibrations_is_known(measure: FakeMeasure) -> None:
    calibrator = Calibrator(measure, lambda _: None, None)
    own = OwnCalibrations(calibrator)
    measure.let_go.set()

    async def many() -> None:
        await own.first(None, QUICK)
        for _ in range(40):
            calibrator.wait()
            job = await own.start(QUICK)
        assert own.last_job is not None
        assert own.last_job.id == job.id

    asyncio.run(many())
    calibrator.wait()


def test_a_profile_that_cannot_be_stored_is_used_and_said(
    measure: FakeMeasure, tmp_path: Path
) -> None:
    blocked = tmp_path / "state"
    blocked.write_text("a file where the directory should be")
    seen: list[Profile] = []
    calibrator = Calibrator(measure, seen.append, ProfileStore(blocked))
    measure.let_go.set()

    job = calibrator.start(QUICK)
    calibrator.wait()

    ended = calibrator.job(job.id)
    assert ended.state == "done"
    assert ended.note is not None
    assert "profile not stored" in ended.note
    assert seen == [PROFILE]


def test_an_unknown_job_is_said(measure: FakeMeasure) -> None:
    calibrator = Calibrator(measure, lambda _: None, None)

    with pytest.raises(UnknownJobError):
        calibrator.job("nope")
    with pytest.raises(UnknownJobError):
        calibrator.cancel("nope")


def test_closing_stops_what_runs(measure: FakeMeasure) -> None:
    calibrator = Calibrator(measure, lambda _: None, None)
    job = calibrator.start(QUICK)

    calibrator.close()

    assert calibrator.job(job.id).state == "cancelled"


def test_an_engine_is_profiled_whole(tiny_artifact: Artifact, tmp_path: Path) -> None:
    engine = Engine(tiny_artifact)
    effort = Effort("quick", budget_s=0.5, precision=Precision(min_runs=5))

    found = profile(engine, effort, batch_sizes=(1, 2, 4))
    ProfileStore(tmp_path).save(found)

    assert found.points == tuple(range(5))
    assert found.batch_sizes == (1, 2, 4)
    assert found.chain[-1] == 4
    assert ProfileStore(tmp_path).find(engine.profile_key(1)).profile == found
    assert ProfileStore(tmp_path).find(engine.profile_key(2)).profile is None


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (16, (1, 2, 4, 8, 16))]
)
def test_batch_sizes_double_up_to_the_largest(largest: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes_to(largest) == sizes


def test_batches_are_no_larger_than_the_settings_allow_and_the_profile_knows(
    tiny_artifact: Artifact,
) -> None:
    effort = Effort("quick", 0.3, Precision(min_runs=5))
    made = profile(Engine(tiny_artifact), effort, batch_sizes=(1, 4, 16))

    up_to_8 = latencies_of(tiny_artifact, made, 8)

    assert up_to_8.max_batch == 8  # what the settings allow, though it was not measured itself
    _, of_4_ms, of_16_ms = made.table(50)[0]
    assert up_to_8.p50_ms[0][7] == pytest.approx(of_4_ms + (of_16_ms - of_4_ms) / 3)
    assert latencies_of(tiny_artifact, made, 99).max_batch == 16
