"""One model on this host: its threads, its points found here, its engine, and its profile."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from benchmarks import host_artifact, profiler
from benchmarks.effort import Effort, Progress
from benchmarks.host_artifact import Kept
from benchmarks.layer_latencies import Measuring
from benchmarks.parallelism import best_threads
from benchmarks.profiler import Turn, alone
from maestro_core.artifact import Artifact
from maestro_core.host import usable_cores
from maestro_core.profile import Profile, ProfileKey
from server.engine import Engine, EngineError
from server.latencies import Latencies
from server.overhead import RUNS_S, overhead_ms
from server.settings import Settings

# Slots: how many batches compute at once. One: a batch has all threads of the engine.
SLOTS = 1


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a server wants of a calibration: to compute in turns with it, to see it, to end it.

    largest_in_use: the batch size up to which it must measure; 0 where nothing is served yet.
    """

    turn: Turn = alone
    progress: Callable[[Progress], object] = lambda _: None
    cancelled: Callable[[], bool] = lambda: False
    largest_in_use: int = 0


ALONE = Hooks()


class HostModel:
    """A model as this host serves it. `source` is its artifact, before any search here.

    `workers` is how many processes serve it at once, each on its own cores.
    """

    def __init__(self, source: Artifact, settings: Settings, workers: int = 1) -> None:
        """Measure nothing yet."""
        self.source, self.settings, self.workers = source, settings, workers

    @cached_property
    def threads(self) -> int:
        """Return how many compute a batch: as set, or the best, measured once per host."""
        if self.settings.threads:
            return self.settings.threads
        if self.settings.provider != "cpu":
            return usable_cores(self.workers)
        return best_threads(self.source, self.settings.state_dir, workers=self.workers)

    def takes_all_cores(self, engine: Engine) -> bool:
        """Return whether computing leaves no core to the event loop alone."""
        threads = SLOTS * engine.intra_op_threads
        return engine.provider == "cpu" and threads >= usable_cores(self.workers)

    def points(self) -> Kept:
        """Return the points found for this host where there are any, else the artifact's own."""
        return host_artifact.of_host(self.source, self.settings.state_dir, self.threads)

    def engine(self, points: Artifact, threads: int = 0) -> Engine:
        """Return the engine that the settings ask for, with so many threads (0: the best).

        Raises:
            EngineError: the provider is not installed, or ONNX Runtime refuses the artifact.
        """
        wish, shared = self.settings.huge_pages, self.workers > 1  # one file for all workers
        return Engine(
            points,
            intra_op_threads=threads or self.threads,
            provider=self.settings.provider,
            state_dir=self.settings.state_dir,
            memory_budget_bytes=self.settings.memory_budget_mib * 2**20 or None,
            huge_pages="never" if shared and wish == "auto" else wish,
        )

    def engine_of(self, profile: Profile) -> Engine:
        """Return the engine that a profile was measured with, by another worker of this host.

        Raises:
            EngineError: it is of points that are not here.
        """
        wanted = profile.key.artifact
        points = self.source if self.source.digest == wanted else self.points().artifact
        if points.digest != wanted:
            raise EngineError(f"the profile is of artifact {wanted}, which is not here any more")
        return self.engine(points, profile.key.intra_op_threads)

    def key(self, engine: Engine) -> ProfileKey:
        """Return what a profile of an engine holds for, as it is served here."""
        return engine.profile_key(SLOTS, self.workers)

    def measured(
        self, effort: Effort, engine: Engine | None = None, hooks: Hooks = ALONE
    ) -> tuple[Engine, Profile]:
        """Return what to serve, and its profile. Not from within an event loop.

        That is `engine` if given, but points searched for first where the effort wants that.
        Within the effort is all that it takes, as far as a search allows (`Effort`).

        Raises:
            ArtifactError: there is nothing to search with, or the disk does not take the points.
            EngineError: the provider is not installed, or ONNX Runtime refuses the artifact.
            CancelledError: the hooks said so.
            TooLittleTimeError: the effort leaves no time for batches that are in use.
        """
        began_s = time.monotonic()
        if not effort.search:
            engine = engine or self.engine(self.points().artifact)
            return engine, self._profiled(engine, effort, began_s, hooks)
        measuring = Measuring(
            effort.search_s,
            self.threads,
            turn=hooks.turn,
            progress=lambda seen: hooks.progress(seen._replace(left_s=None)),
            cancelled=hooks.cancelled,
        )
        state_dir = self.settings.state_dir
        with host_artifact.searched(self.source, state_dir, measuring) as found:
            profile = self._profiled(self.engine(found), effort, began_s, hooks)
            kept = host_artifact.keep(found, self.source, state_dir, self.threads)
        return self.engine(kept), profile

    def _profiled(self, engine: Engine, effort: Effort, began_s: float, hooks: Hooks) -> Profile:
        """Return the profile of `engine`, within what is left of the effort since `began_s`."""
        profile = profiler.profile(
            engine,
            effort.after(time.monotonic() - began_s + RUNS_S),
            batch_sizes=profiler.batch_sizes_to(self.settings.max_batch),
            compute_threads=SLOTS,
            workers=self.workers,
            turn=hooks.turn,
            progress=hooks.progress,
            cancelled=hooks.cancelled,
            largest_in_use=hooks.largest_in_use,
        )
        around_ms = overhead_ms(
            engine,
            latencies_of(engine.artifact, profile, profile.batch_sizes[-1]),
            shares_core=self.takes_all_cores(engine),
            turn=hooks.turn,
            cancelled=hooks.cancelled,
        )
        return replace(profile, overhead_ms=around_ms)


def latencies_of(artifact: Artifact, profile: Profile, max_batch: int) -> Latencies:
    """Return what the selector needs to know of the points on this host, up to `max_batch`."""
    accuracy = [point.score.value for point in artifact.points]
    every = Latencies.from_quantiles(
        accuracy, profile.batch_sizes, profile.table(50), profile.table(99), profile.overhead_ms
    )
    p50_ms, tail_ms = (
        tuple(row[:max_batch] for row in table) for table in (every.p50_ms, every.tail_ms)
    )
    return replace(every, p50_ms=p50_ms, tail_ms=tail_ms)
