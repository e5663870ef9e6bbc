"""The /profile job: one calibration at a time, in a thread, with progress and cancel. No HTTP."""

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from benchmarks.effort import QUICK, CancelledError, Effort, Progress
from maestro_core.profile import Profile
from maestro_core.profile_store import ProfileStore, StoreError

log = logging.getLogger("maestro")

_KEPT_JOBS = 32
_LEAVE_S = 10.0

# Effort, progress, cancelled -> a profile, or CancelledError
Measure = Callable[[Effort, Callable[[Progress], object], Callable[[], bool]], Profile]
Source = Literal["measured", "stored"]


class Given(NamedTuple):
    """A profile to serve with, and whether it was measured since the start."""

    profile: Profile
    source: Source


class AlreadyRunningError(Exception):
    """A calibration is under way: `job`. The message names it."""

    def __init__(self, job: "Job") -> None:
        left = "" if job.seconds_left is None else f"; {job.seconds_left:.0f} s left at most"
        super().__init__(f"calibration {job.id} is running{left}")
        self.job = job


class UnknownJobError(KeyError):
    """No job of that id, or one so old that it is forgotten."""


@dataclass(frozen=True, slots=True)
class Job:
    """A calibration, as it stood when asked for.

    `done` of `total` cells (point × batch size) are known well enough: on a noisy host it may be
    none of them when the time is over, and their intervals say so. `note` says what a job that
    is done could not do: store its profile.
    """

    id: str
    state: Literal["running", "done", "cancelled", "failed"]
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    error: str | None = None
    note: str | None = None


class Calibrator:
    """Runs calibrations, one at a time; safe to call from any thread."""

    def __init__(
        self,
        measure: Measure,
        on_profile: Callable[[Profile], object],
        store: ProfileStore | None,
    ) -> None:
        """Keep what to do: `on_profile` is called in the job's thread, before the job is done."""
        self._measure, self._on_profile, self._store = measure, on_profile, store
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._cancel = threading.Event()  # of the job that was started last
        self._running_id: str | None = None
        self._thread: threading.Thread | None = None

    def start(self, effort: Effort) -> Job:
        """Start a calibration.

        Raises:
            AlreadyRunningError: one is under way.
        """
        with self._lock:
            for job in self._jobs.values():
                if job.state == "running":
                    raise AlreadyRunningError(job)
            job = Job(secrets.token_hex(4), "running", seconds_left=effort.most_s)
            cancel = threading.Event()
            thread = threading.Thread(
                target=self._work,
                args=(job.id, effort, cancel),
                name="calibration",
                daemon=True,
            )
            thread.start()  # no job is left running where the host takes no more threads
            self._jobs[job.id] = job
            while len(self._jobs) > _KEPT_JOBS:
                del self._jobs[next(iter(self._jobs))]
            self._running_id, self._cancel = job.id, cancel
            self._thread = thread  # others may wait for it from now on
        return job

    def job(self, job_id: str) -> Job:
        """Return how far a calibration is.

        Raises:
            UnknownJobError: there is none of that id.
        """
        with self._lock:
            if job_id not in self._jobs:
                raise UnknownJobError(job_id)
            return self._jobs[job_id]

    def cancel(self, job_id: str) -> Job:
        """Ask a calibration to stop after its present trial; one that has ended stays as it is.

        Raises:
            UnknownJobError: there is none of that id.
        """
        job = self.job(job_id)
        with self._lock:
            if job.state == "running" and self._running_id == job_id:  # another may have begun
                self._cancel.set()
        return job

    def close(self) -> None:
        """Cancel what runs, and wait until its thread has ended, unless a trial hangs."""
        self._cancel.set()
        self.wait(_LEAVE_S)

    def wait(self, limit_s: float | None = None) -> None:
        """Wait until no calibration runs, `limit_s` at most if given."""
        if self._thread is not None:
            self._thread.join(limit_s)

    def _work(self, job_id: str, effort: Effort, cancel: threading.Event) -> None:
        def progress(seen: Progress) -> None:
            self._update(job_id, done=seen.done, total=seen.total, seconds_left=seen.left_s)

        try:
            profile = self._measure(effort, progress, cancel.is_set)
            self._on_profile(profile)
            note = self._stored(profile)
        except CancelledError:
            self._update(job_id, state="cancelled", seconds_left=None)
        except Exception as error:  # a thread has nobody else to tell
            message = f"{type(error).__name__}: {error}"
            log.warning("%s calibration failed: %s", effort.kind, message)
            self._update(job_id, state="failed", seconds_left=None, error=message)
        else:
            if note:
                log.warning("profile not stored, so the next start measures again: %s", note)
            self._update(job_id, state="done", seconds_left=0.0, note=note)

    def _stored(self, profile: Profile) -> str | None:
        if self._store is None:
            return None
        try:
            self._store.save(profile)
        except StoreError as error:
            return str(error)
        return None

    def _update(self, job_id: str, **changes: object) -> None:
        with self._lock:
            if job_id in self._jobs:
                self._jobs[job_id] = replace(self._jobs[job_id], **changes)  # type: ignore[arg-type]


def first_effort(budget_s: float) -> Effort:
    """Return what a first start may measure."""
    return Effort("quick", budget_s, QUICK.precision)


class OwnCalibrations:
    """The calibrations of a server alone; a worker among several asks `server.processes.team`."""

    def __init__(self, calibrator: Calibrator) -> None:
        self._calibrator = calibrator
        self._last: str | None = None

    @property
    def last_job(self) -> Job | None:
        """Return the calibration that was started last."""
        return None if self._last is None else self._calibrator.job(self._last)

    async def first(self, stored: Profile | None, effort: Effort) -> Given | None:
        """Return what to serve with; None while that is measured, and handed over later."""
        if stored is not None:
            return Given(stored, "stored")
        await self.start(effort)
        return None

    async def start(self, effort: Effort) -> Job:
        """Start a calibration.

        Raises:
            AlreadyRunningError: one is under way.
        """
        job = self._calibrator.start(effort)
        self._last = job.id  # the last is never forgotten
        return job

    async def job(self, job_id: str) -> Job:
        """Return how far a calibration is.

        Raises:
            UnknownJobError: there is none of that id.
        """
        return self._calibrator.job(job_id)

    async def cancel(self, job_id: str) -> Job:
        """Ask a calibration to stop.

        Raises:
            UnknownJobError: there is none of that id.
        """
        return self._calibrator.cancel(job_id)

    async def close(self) -> None:
        """Cancel what runs, and wait until it has ended."""
        await asyncio.to_thread(self._calibrator.close)
