"""What workers ask of all of them together: who measures, which profile is used, the totals.

Lives in the supervisor's event loop. Knows nothing of how workers are started, nor of HTTP.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.effort import CancelledError, Effort, Progress
from maestro_core.profile import Profile
from maestro_core.profile_store import ProfileStore
from server.calibration import (
    AlreadyRunningError,
    Calibrator,
    Given,
    Job,
    UnknownJobError,
    first_effort,
)
from server.processes import counters
from server.processes.channel import Channel, LostError
from server.settings import Settings

T = TypeVar("T")

# A worker that hangs does not hold up the metrics of the others.
_GAUGE_S = 1.0
# Its event loop stands still if it answers neither of two calls that have so long each: of one, it
# may be this process that stood still.
_HUNG_S = 15.0


class Hub:
    """The workers that have joined, by number, and what they share; made on an event loop."""

    def __init__(
        self, settings: Settings, directory: Path, on_progress: Callable[[Progress], object]
    ) -> None:
        self._settings, self._directory, self._on_progress = settings, directory, on_progress
        self._board = counters.Board(directory, settings.workers)
        self._loop = asyncio.get_running_loop()
        self._members: dict[int, Channel] = {}
        self._given: Given | None = None
        store = ProfileStore(settings.state_dir)
        self._calibrator = Calibrator(self._measure, self._share, store)
        self._lead, self._job = 0, ""  # of the calibration that was started last
        self._round: dict[str, Any] | None = None  # job and effort, while one measures
        self._seen: Callable[[Progress], object] = lambda _: None
        self._again: asyncio.Task[None] | None = None  # a loop alone would let go of it

    async def answer(self, index: int, channel: Channel, name: str, given: dict[str, Any]) -> Any:  # noqa: ANN401  any JSON
        """Return what a worker asks for."""
        match name:
            case "join":
                return await self._join(index, channel, given["profile"])
            case "calibrate":
                return self._start(index, Effort.from_dict(given["effort"]))
            case "job":
                return self._known(self._calibrator.job, given["job"])
            case "cancel":
                return self._cancel(given["job"])
            case "progress":
                self._seen(Progress(**given))
            case "metrics":
                return await self._totals()
            case "gauge":
                await self._gauge()
        return None

    @property
    def serves(self) -> bool:
        """Return whether any worker accepts connections."""
        return any(count != counters.ACCEPTS_NONE for count in self._board.connections)

    def left(self, index: int) -> bool:
        """Go on without a worker that has ended; return whether it accepted connections."""
        self._members.pop(index, None)
        counters.forget_gauges(index, self._directory)
        accepted = self._board.connections[index] != counters.ACCEPTS_NONE
        self._board.connections[index] = counters.ACCEPTS_NONE
        return accepted

    async def answers(self, index: int) -> bool:
        """Return whether a worker's event loop turns. Before it serves, and after, nobody asks.

        To start takes as long as a network needs.
        """
        member = self._members.get(index)
        if member is None or self._board.connections[index] == counters.ACCEPTS_NONE:
            return True
        with suppress(LostError):
            return await _beats(member)
        return True

    async def _join(
        self, index: int, channel: Channel, stored: str | None
    ) -> dict[str, str] | None:
        """Take a worker in; return the profile that all use, if there is one yet."""
        self._members[index] = channel
        if self._given is None and stored is not None:
            self._given = Given(Profile.from_json(stored), "stored")
            for other in set(self._members.values()) - {channel}:
                other.tell("use", **_handed(self._given))
        if self._round is not None:
            channel.tell("load", **self._round)
        if self._given is None and self._round is None:
            await asyncio.to_thread(self._calibrator.wait)  # one that ends, with a profile or not
            self._start_first()
        return None if self._given is None else _handed(self._given)

    def _start_first(self) -> None:
        """Measure once all workers run, if there is nothing to serve with yet.

        A worker that ends is lost before its process is gone; its successor begins this again.
        """
        running = sum(not member.is_lost for member in self._members.values())
        if self._given is None and running == self._settings.workers:
            self._start(min(self._members), first_effort(self._settings.calibration_budget_s))

    # -- calibrations ------------------------------------------------------------------------

    def _start(self, lead: int, effort: Effort) -> tuple[bool, dict[str, Any]]:
        """Start a calibration; return whether none was under way, and the one that is now."""
        try:
            job = self._calibrator.start(effort)
        except AlreadyRunningError as error:
            return False, asdict(error.job)
        # The job's thread has its work done on this event loop, so after this.
        self._lead, self._job = lead, job.id
        self._round = {"job": job.id, "effort": asdict(effort)}
        return True, asdict(job)

    def _measure(
        self,
        _effort: Effort,
        progress: Callable[[Progress], object],
        cancelled: Callable[[], bool],
    ) -> Profile:
        """Have the lead measure; in the calibrator's thread."""
        return self._wait(self._lead_measures(progress, cancelled))

    async def _lead_measures(
        self, progress: Callable[[Progress], object], cancelled: Callable[[], bool]
    ) -> Profile:
        """Return what one worker measures while all others load their cores as it does."""
        work = self._round or {}

        def seen(now: Progress) -> None:
            progress(now)
            self._on_progress(now)

        self._seen = seen
        others = {i: member for i, member in self._members.items() if i != self._lead}
        try:
            if cancelled():
                raise CancelledError
            for other in others.values():
                other.tell("load", **work)
            text = await self._measured(work)
            if text is None:
                raise CancelledError
            await self._check_loaded(others)
        except CancelledError:
            self._tell_end(Job(self._job, "cancelled"))
            raise
        except Exception as error:
            self._tell_failed(error)
            if isinstance(error, LostError):
                self._again = self._loop.create_task(self._first_again())
            raise
        finally:
            self._round = None
            for other in self._others(self._lead):
                other.tell("stop")
        return Profile.from_json(text)

    async def _measured(self, work: dict[str, Any]) -> str | None:
        """Return the text of the profile that the lead measures; None when it was cancelled."""
        lead = self._members.get(self._lead)
        try:
            if lead is None:
                raise LostError
            text: str | None = await lead.call("measure", **work)
        except LostError:
            raise LostError(f"worker {self._lead}, which measured, has ended") from None
        return text

    async def _check_loaded(self, others: dict[int, Channel]) -> None:
        """Check that all who were to load their cores meanwhile are there, and well.

        Raises:
            LostError: one has ended; another may be in its place.
            TimeoutError: one does not answer.
        """
        for index, member in others.items():
            try:
                well = await _beats(member)
            except LostError:
                raise LostError(
                    f"worker {index} ended while worker {self._lead} measured"
                ) from None
            if not well:
                raise TimeoutError(f"worker {index} hangs: it may have loaded nothing meanwhile")

    async def _first_again(self) -> None:
        """Begin a first calibration again that lost a worker; its successor may have joined."""
        await asyncio.to_thread(self._calibrator.wait)
        self._start_first()

    def _tell_failed(self, error: BaseException) -> None:
        self._tell_end(Job(self._job, "failed", error=f"{type(error).__name__}: {error}"))

    def _tell_end(self, job: Job) -> None:
        """Have all workers know of a calibration that failed or was cancelled."""
        for member in self._members.values():
            member.tell("ended", **asdict(job))

    def _share(self, profile: Profile) -> None:
        """Have all workers use a profile; in the calibrator's thread."""
        self._wait(self._all_use(Given(profile, "measured")))

    async def _all_use(self, given: Given) -> None:
        self._given = given
        calls = [member.call("use", **_handed(given)) for member in self._members.values()]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, LostError):
                self._tell_failed(result)
                raise result

    def _cancel(self, job_id: str) -> dict[str, Any] | None:
        job = self._known(self._calibrator.cancel, job_id)
        if job is not None and job["state"] == "running" and self._lead in self._members:
            self._members[self._lead].tell("stop")
        return job

    def _known(self, call: Callable[[str], Job], job_id: str) -> dict[str, Any] | None:
        try:
            return asdict(call(job_id))
        except UnknownJobError:
            return None

    def _others(self, index: int) -> list[Channel]:
        return [member for i, member in self._members.items() if i != index]

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # -- metrics -----------------------------------------------------------------------------

    async def _totals(self) -> str:
        await self._gauge()
        return counters.totals(self._directory).decode()

    async def _gauge(self) -> None:
        """Have all workers bring gauges and counts up to date."""
        calls = [member.call("gauge") for member in self._members.values()]
        with suppress(TimeoutError):
            async with asyncio.timeout(_GAUGE_S):
                await asyncio.gather(*calls, return_exceptions=True)


async def _beats(member: Channel) -> bool:
    """Return whether a worker's event loop turns.

    Raises:
        LostError: it has ended.
    """
    for _ in range(2):
        with suppress(TimeoutError):
            async with asyncio.timeout(_HUNG_S):
                await member.call("beat")
                return True
    return False


def _handed(given: Given) -> dict[str, str]:
    """Return a profile as it is handed over."""
    return {"profile": given.profile.to_json(), "source": given.source}
