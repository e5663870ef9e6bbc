"""The other workers, as one of them sees them: it asks the supervisor, and does what that asks.

A calibration is one worker's: the supervisor has it measure, and has all others load their cores
the same way meanwhile, so that what is measured holds when all of them serve. Its profile is then
everyone's. A worker that starts later is given it, and does not measure.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from benchmarks.effort import CancelledError, Effort, Progress
from maestro_core.profile import Profile
from server.calibration import (
    AlreadyRunningError,
    Given,
    Job,
    Measure,
    Source,
    UnknownJobError,
)
from server.errors import UnavailableError
from server.processes.channel import Channel, LostError, open_channel
from server.statistics import Statistics

_REPORT_S = 0.2  # between two reports of how far a calibration is


class Hands(NamedTuple):
    """What a worker can do for the others; the first two in a thread."""

    measure: Measure
    load: Measure
    take: Callable[[Profile, Source], Awaitable[None]]
    gauge: Callable[[], None]


class Team:
    """One worker's end of the channel to the supervisor, and what all of them count."""

    def __init__(self, size: int, control: socket.socket, statistics: Statistics) -> None:
        self.size, self.statistics = size, statistics
        self.last_job: Job | None = None
        self._control = control
        self._stop = threading.Event()
        self._is_closed = False
        self._reported_s = 0.0

    def join(self, hands: Hands) -> None:
        """Be one that does this for the others."""
        self._hands = hands

    # -- asked of the supervisor -------------------------------------------------------------

    async def first(self, stored: Profile | None, _effort: Effort) -> Given | None:
        """Return what to serve with; None while that is measured, and handed over later."""
        self._loop = asyncio.get_running_loop()
        self._channel: Channel = await open_channel(self._control, self._answer)
        self._running = asyncio.create_task(self._channel.run())
        text = None if stored is None else stored.to_json()
        given = await self._call("join", profile=text)
        if given is None:
            return None
        return Given(Profile.from_json(given["profile"]), given["source"])

    async def start(self, effort: Effort) -> Job:
        """Start a calibration, which this worker measures.

        Raises:
            AlreadyRunningError: one is under way, here or elsewhere.
        """
        started, job = await self._call("calibrate", effort=asdict(effort))
        if not started:
            raise AlreadyRunningError(Job(**job))
        return Job(**job)

    async def job(self, job_id: str) -> Job:
        """Return how far a calibration is, whichever worker measures.

        Raises:
            UnknownJobError: there is none of that id.
        """
        return self._known(job_id, await self._call("job", job=job_id))

    async def cancel(self, job_id: str) -> Job:
        """Ask a calibration to stop.

        Raises:
            UnknownJobError: there is none of that id.
        """
        return self._known(job_id, await self._call("cancel", job=job_id))

    async def metrics_text(self) -> bytes:
        """Return the metrics of all workers together."""
        text: str = await self._call("metrics")
        return text.encode()

    async def gauge(self) -> None:
        """Have all workers bring their gauges and counts up to date."""
        await self._call("gauge")

    async def close(self) -> None:
        """Stop measuring, for good: the process does not end before its threads do."""
        self._is_closed = True
        self._stop.set()

    async def _call(self, name: str, **given: Any) -> Any:  # noqa: ANN401  any JSON
        try:
            return await self._channel.call(name, **given)
        except LostError as error:
            raise UnavailableError("the supervisor has ended") from error

    def _known(self, job_id: str, found: dict[str, Any] | None) -> Job:
        if found is None:
            raise UnknownJobError(job_id)
        return Job(**found)

    # -- asked by the supervisor -------------------------------------------------------------

    async def _answer(self, name: str, given: dict[str, Any]) -> Any:  # noqa: ANN401  any JSON
        match name:
            case "measure":
                return await self._measure(self._begun(given), self._stop.is_set)
            case "load":
                await self._load(self._begun(given), self._stop.is_set)
            case "stop":
                self._stop.set()
            case "use":
                await self._hands.take(Profile.from_json(given["profile"]), given["source"])
            case "ended":
                self.last_job = Job(**given)
            case "gauge":
                self._hands.gauge()
            case "beat":
                pass  # to answer is all
        return None

    def _begun(self, given: dict[str, Any]) -> Effort:
        """Note a calibration, in the place of the one before; return its effort.

        A worker that joins as one begins is told twice.
        """
        effort = Effort.from_dict(given["effort"])
        self._stop.set()
        if not self._is_closed:
            self._stop = threading.Event()
        self.last_job = Job(given["job"], "running", seconds_left=effort.most_s)
        return effort

    async def _measure(self, effort: Effort, is_stopped: Callable[[], bool]) -> str | None:
        """Return the text of a profile; None when it was cancelled."""
        try:
            profile = await asyncio.to_thread(
                self._hands.measure, effort, self._in_loop(self._reported), is_stopped
            )
        except CancelledError:
            return None
        return profile.to_json()

    async def _load(self, effort: Effort, is_stopped: Callable[[], bool]) -> None:
        """Measure for nobody, over and over, until told to stop."""
        effort, seen = replace(effort, search=False), self._in_loop(self._seen)
        with suppress(CancelledError):
            while not is_stopped():
                await asyncio.to_thread(self._hands.load, effort, seen, is_stopped)

    def _in_loop(self, seen: Callable[[Progress], object]) -> Callable[[Progress], object]:
        """Return what the thread that measures may call."""
        return lambda now: self._loop.call_soon_threadsafe(seen, now)

    def _reported(self, seen: Progress) -> None:
        self._seen(seen)
        now = time.monotonic()
        if now - self._reported_s >= _REPORT_S or seen.done == seen.total:
            self._reported_s = now
            self._channel.tell("progress", **seen._asdict())

    def _seen(self, seen: Progress) -> None:
        if self.last_job is not None:
            self.last_job = replace(
                self.last_job, done=seen.done, total=seen.total, seconds_left=seen.left_s
            )
