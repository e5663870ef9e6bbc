"""One served model: artifact, engine, profile and scheduler, put together. Knows no routes."""

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.effort import Effort, Progress
from maestro_core import artifact, held_out
from maestro_core.profile import Profile, ProfileError
from maestro_core.profile_store import ProfileStore
from server import inputs
from server.answers import Inference, frontier_rows
from server.calibration import (
    AlreadyRunningError,
    Calibrator,
    Job,
    OwnCalibrations,
    Source,
    UnknownJobError,
    first_effort,
)
from server.counting import Counting
from server.dispatcher import Dispatcher, Runner, Tell
from server.engine import Engine
from server.errors import ConflictError, InvalidError, NotFoundError, UnavailableError
from server.latencies import Latencies
from server.measuring import SLOTS, Hooks, HostModel, latencies_of
from server.metrics import Metrics
from server.policies import check_kept, scheduler_of
from server.processes.team import Hands, Team
from server.requests import Request
from server.schemas import InferParameters
from server.settings import Settings
from server.stand_in import Nothing, StandIn
from server.statistics import Statistics, private_row
from server.worker import Turns

log = logging.getLogger("maestro")

Floats = NDArray[np.float32]
Receive = Callable[[], Awaitable[Any]]

DRAIN_S = 10.0


@dataclass(frozen=True, slots=True)
class _Serving:
    """What serves once the host is profiled; replaced as a whole by a new profile."""

    dispatcher: Dispatcher
    profile: Profile
    source: Source
    stand_in: StandIn | None

    def slowdown(self) -> float:
        return self.dispatcher.scheduler.slowdown(time.monotonic())


class Service:
    """Loads in its constructor; measures and serves once started on an event loop."""

    def __init__(
        self,
        settings: Settings,
        on_progress: Callable[[Progress], object] = lambda _: None,
        team: Team | None = None,
    ) -> None:
        """Load the artifact and every point; `team` is the other workers, if there are any.

        Raises:
            ArtifactError: the artifact cannot be served.
            EngineError: ONNX Runtime refuses it.
        """
        self.settings = settings
        self.version = version("maestro-serve")
        self._team = team
        workers = team.size if team else 1
        self._host = HostModel(artifact.load(settings.artifact), settings, workers)
        self.artifact, note = self._host.points()
        _warn(note)
        row = private_row()
        self.statistics = team.statistics if team else Statistics(row, [row])
        self.counting = Counting(Metrics(), self.statistics)
        self._engine = self._measured_engine = self._host.engine(self.artifact)
        _warn(self._engine.note)
        self._store = ProfileStore(settings.state_dir)
        self._turns = Turns()
        self._calibrations: OwnCalibrations | Team
        if team:
            team.join(Hands(self._measure, self._load, self._take, self.gauge))
            self._calibrations = team
        else:
            own = Calibrator(self._measure, self._on_profile, self._store)
            self._calibrations = OwnCalibrations(own)
        self._on_progress = on_progress
        self._ids = map(str, itertools.count())
        self._serving: _Serving | None = None
        self.is_leaving = False
        self._stop_s = DRAIN_S
        self._stopping = False

    # -- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Use the stored profile of this host, or start to measure one."""
        self._loop = asyncio.get_running_loop()
        inputs.warm_up(self.artifact.manifest.input)
        found = self._store.find(self._host.key(self._engine), len(self.artifact.points))
        if found.reason:
            log.warning("profile not used: %s", found.reason)
        effort = first_effort(self.settings.calibration_budget_s)
        given = await self._calibrations.first(found.profile, effort)
        if given is not None:
            await self._take(*given)
            return
        log.info("no profile of this host yet: calibrating, %g s at most", effort.budget_s)

    def leave(self, stop_s: float | None = None) -> None:
        """Be not ready from now on, and serve on until stopped, which then takes so long at most.

        None leaves that as it is.
        """
        self.is_leaving = True
        self._stop_s = self._stop_s if stop_s is None else stop_s

    async def stop(self) -> None:
        """Answer what was taken, then end."""
        self._stopping = True
        await self._calibrations.close()
        if self._serving:
            await _retire(self._serving, self._stop_s)
        self.counting.flush()

    @property
    def is_ready(self) -> bool:
        """Return whether requests should be sent here."""
        return self._serving is not None and not self.is_leaving and not self._stopping

    def serving(self) -> _Serving:
        """Return what serves now.

        Raises:
            UnavailableError: nothing yet, or no more.
        """
        if self._stopping:
            raise UnavailableError("the server is shutting down")
        if self._serving is None:
            job = self.progress().get("calibration", {})
            if job.get("error"):
                raise UnavailableError(f"the calibration failed: {job['error']}", 60.0)
            if job.get("state") == "cancelled":
                raise UnavailableError("the calibration was cancelled; start another", 60.0)
            raise UnavailableError("calibrating this host", job.get("seconds_left") or 1.0)
        return self._serving

    @property
    def stand_in(self) -> StandIn | None:
        """Return who stands in where an inference is only gone through; None: nobody yet."""
        return self._serving.stand_in if self._serving and not self._stopping else None

    def is_quiet(self, seconds: float) -> bool:
        """Return whether no inference was asked for in so long, and nothing computes."""
        return self._turns.is_quiet(seconds)

    @property
    def max_batch(self) -> int:
        """Return the most samples in a batch: what the settings allow and the profile knows."""
        most = self.settings.max_batch
        return min(most, self._serving.profile.batch_sizes[-1]) if self._serving else most

    def progress(self) -> dict[str, Any]:
        """Return the last calibration, while there is no profile to serve with."""
        job = self._calibrations.last_job
        if job is None or self._serving is not None:
            return {}
        return {"calibration": asdict(job)}

    # -- inference ---------------------------------------------------------------------------

    async def infer(
        self, x: Floats, parameters: InferParameters, arrived_s: float, receive: Receive
    ) -> Inference:
        """Return the output for `x`, (n, …), at the point that its target allows.

        Raises:
            ServiceError: it was refused, ran out of time, or the engine failed.
        """
        serving = self.serving()
        request = self._request(parameters, arrived_s, len(x))
        return await serving.dispatcher.infer(request, x, receive)

    def begin(
        self, x: Floats, parameters: InferParameters, arrived_s: float, tell: Tell
    ) -> Callable[[], None]:
        """Begin such an inference for who doesn't await it; return what gives it up.

        Raises:
            ServiceError: it was refused.
        """
        dispatcher = self.serving().dispatcher
        return dispatcher.begin(self._request(parameters, arrived_s, len(x)), x, tell)

    def explain(self, parameters: InferParameters) -> dict[str, Any]:
        """Return what would be chosen for one sample that came now, and why.

        Raises:
            ServiceError: the parameters are wrong, or nothing is served yet.
        """
        scheduler = self.serving().dispatcher.scheduler
        now = time.monotonic()  # not when this came: a question takes longer than an inference
        request = self._request(parameters, now, 1)
        try:
            return asdict(scheduler.explain(request, now))
        except ValueError as error:
            raise InvalidError(str(error)) from error

    def gauge(self) -> None:
        """Bring the gauges, and the counts of answers just sent, up to date."""
        self.counting.flush()
        metrics = self.counting.metrics
        metrics.ready.set(self.is_ready)
        if self._serving:
            metrics.queue_depth.set(self._serving.dispatcher.scheduler.waiting)
            metrics.slowdown.set(self._serving.slowdown())

    async def statistics_answer(self) -> dict[str, Any]:
        """Return what the protocol's statistics extension answers, of all workers together."""
        if self._team:
            await self._team.gauge()
        else:
            self.gauge()
        manifest = self.artifact.manifest
        return self.statistics.answer(manifest.name, manifest.version)

    async def metrics_text(self) -> bytes:
        """Return the metrics in Prometheus' text format, of all workers together."""
        if self._team:
            return await self._team.metrics_text()
        self.gauge()
        return self.counting.metrics.text()

    # -- profile -----------------------------------------------------------------------------

    def frontier(self, batch: int) -> dict[str, Any]:
        """Return the points with this host's latencies for a batch size, cheapest first.

        Raises:
            InvalidError: the batch size was not profiled.
            UnavailableError: there is no profile yet.
        """
        profile = self.serving().profile
        try:
            rows = frontier_rows(self.artifact, profile, batch)
        except ProfileError as error:
            raise InvalidError(str(error)) from error
        return {"model": self.artifact.manifest.name, "batch": batch, "points": rows}

    def profile_answer(self) -> dict[str, Any]:
        """Return the profile in use, and where it comes from.

        Raises:
            UnavailableError: there is none yet.
        """
        serving = self.serving()
        return {
            "source": serving.source,
            "slowdown": serving.slowdown(),
            "profile": asdict(serving.profile),
        }

    async def start_calibration(self, effort: Effort) -> dict[str, Any]:
        """Start a calibration beside the serving; return its job.

        Raises:
            ConflictError: one is under way.
            InvalidError: a search is wanted, and the artifact holds nothing to search with.
        """
        if effort.search and not held_out.is_searchable(self._host.source):
            files = f"{held_out.EVAL} and {held_out.ERRORS}"
            raise InvalidError(f"search: {self.artifact.manifest.name} lacks {files}; export again")
        try:
            return asdict(await self._calibrations.start(effort))
        except AlreadyRunningError as error:
            raise ConflictError(str(error), job=error.job.id) from error

    async def job(self, job_id: str) -> dict[str, Any]:
        """Return how far a calibration is.

        Raises:
            NotFoundError: there is no such job.
        """
        return await self._known(self._calibrations.job, job_id)

    async def cancel_calibration(self, job_id: str) -> dict[str, Any]:
        """Cancel a calibration; one that has ended stays as it is.

        Raises:
            NotFoundError: there is no such job.
        """
        return await self._known(self._calibrations.cancel, job_id)

    # -- inside ------------------------------------------------------------------------------

    def _request(self, parameters: InferParameters, arrived_s: float, rows: int) -> Request:
        request = parameters.request(next(self._ids), arrived_s, rows)
        check_kept(self.settings.policy, request)
        most = self.max_batch
        if most < rows <= self.settings.max_batch:
            raise InvalidError(
                f"a request has 1..{most} samples, not {rows}: this host's profile has no larger "
                "batches yet; a longer calibration (POST /profile) measures them"
            )
        return request

    async def _known(self, call: Callable[[str], Awaitable[Job]], job_id: str) -> dict[str, Any]:
        try:
            return asdict(await call(job_id))
        except UnknownJobError as error:
            raise NotFoundError(f"there is no calibration '{job_id}'") from error

    def _measure(
        self,
        effort: Effort,
        progress: Callable[[Progress], object],
        cancelled: Callable[[], bool],
    ) -> Profile:
        def both(seen: Progress) -> None:
            progress(seen)
            self._on_progress(seen)

        in_use = self.max_batch if self._serving else 0
        hooks = Hooks(self._turns.trial, both, cancelled, in_use)
        self._measured_engine, profile = self._host.measured(effort, self._engine, hooks)
        if effort.search:
            _warn(self._measured_engine.note)
        return profile

    def _load(
        self,
        effort: Effort,
        progress: Callable[[Progress], object],
        cancelled: Callable[[], bool],
    ) -> Profile:
        """Measure what is served while another worker measures what counts."""
        hooks = Hooks(self._turns.trial, progress, cancelled)
        _, profile = self._host.measured(effort, self._engine, hooks)
        return profile

    async def _take(self, profile: Profile, source: Source) -> None:
        """Serve with a profile that this or another worker measured."""
        for engine in (self._engine, self._measured_engine):
            if self._host.key(engine) == profile.key:
                break
        else:
            engine = await asyncio.to_thread(self._host.engine_of, profile)
            self._measured_engine = engine  # the one before it is nobody's any more
        if self._serving is None:  # a profile is of a warm engine
            await asyncio.to_thread(engine.warm_up)
        self._use(profile, source, engine)

    def _on_profile(self, profile: Profile) -> None:
        """Serve with a new profile; called in the calibration's thread, which fails if that does.

        What a profile in use can't do would else be known to nobody.
        """
        asyncio.run_coroutine_threadsafe(self._renew(profile), self._loop).result()

    async def _renew(self, profile: Profile) -> None:
        self._use(profile, "measured", self._measured_engine)

    def _use(self, profile: Profile, source: Source, engine: Engine) -> None:
        """Let requests from now on go by this profile; those before stay with theirs."""
        if self._stopping:
            return
        self._engine, self.artifact = engine, engine.artifact
        before = self._serving
        latencies = latencies_of(self.artifact, profile, self.settings.max_batch)
        dispatcher = self._dispatcher(
            latencies,
            engine,
            self._turns,
            on_batch=self.counting.ran,
            on_decision=self.counting.decided,
            on_preemption=self.counting.metrics.preempted,
        )
        stand_in = None
        if self.settings.keep_warm_ms:
            apart = self._dispatcher(latencies, Nothing(self.artifact), Turns())
            stand_in = StandIn(self.artifact, apart)
        self._serving = _Serving(dispatcher, profile, source, stand_in)
        most = profile.batch_sizes[-1]
        if most < self.settings.max_batch:
            log.warning("batches of %d at most: the profile has no larger; another may", most)
        log.info("ready; profile %s, of %s", source, profile.measured_at)
        if before is not None:
            self._retiring = asyncio.create_task(_retire(before, None))

    def _dispatcher(
        self,
        latencies: Latencies,
        runner: Runner,
        turns: Turns,
        **told: Callable[..., None],
    ) -> Dispatcher:
        return Dispatcher(
            scheduler_of(
                self.settings.policy,
                latencies,
                max_queue=self.settings.max_queue,
                slots=SLOTS,
            ),
            runner,
            turns,
            slots=SLOTS,
            shares_core=self._host.takes_all_cores(self._engine),
            **told,
        )


def _warn(note: str | None) -> None:
    if note:
        log.warning("%s", note)


async def _retire(serving: _Serving, limit_s: float | None) -> None:
    await serving.dispatcher.drain(limit_s)
    serving.dispatcher.close()
    if serving.stand_in:
        serving.stand_in.close()
