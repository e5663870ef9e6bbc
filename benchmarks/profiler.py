"""Measures how long each point takes at each batch size, on this host, in this process.

Serving and calibration stay clean of each other because a trial runs only inside a *turn*, which
the server hands out: the turn excludes every other computation of the process while the trial
runs, so that none is in a measured time, and it is given only when no request waits; a request
that arrives during a trial waits for that one trial at most, never for the calibration.
"""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.smoothing import smooth
from maestro_core.profile import Kind, Latency, Profile, Stop
from server.engine import Engine

Run = Callable[[int, int], object]  # point, batch
Clock = Callable[[], float]  # monotonic seconds
Turn = Callable[[float], AbstractContextManager[object]]  # the seconds that it will take

_TRIAL_S = 0.002  # a turn lasts about this long, or one run
_MAX_RUNS = 20  # in a trial
_MIN_ROUNDS = 5
_RESAMPLES = 200
_FIRST_ROUND_SHARE = 0.5  # of the budget: larger batches that don't fit it are dropped
_QUANTILES = (0.5, 0.9, 0.95, 0.99)


class CancelledError(Exception):
    """The calibration was cancelled; nothing of it is kept."""


@dataclass(frozen=True, slots=True)
class Precision:
    """When a median is known well enough: half its 95 % interval is within the larger of both."""

    relative: float = 0.02
    absolute_ms: float = 0.005
    min_runs: int = 100  # a p95 needs that many

    def is_met(self, latency: Latency) -> bool:
        """Return whether a latency is known well enough."""
        half_ms = (latency.p50_high_ms - latency.p50_low_ms) / 2
        wanted_ms = max(self.relative * latency.p50_ms, self.absolute_ms)
        return latency.n >= self.min_runs and half_ms <= wanted_ms


@dataclass(frozen=True, slots=True)
class Effort:
    """How much a calibration may cost."""

    kind: Kind
    budget_s: float
    precision: Precision


# What surrounds the trials takes the rest of 15 s and of 120 s.
QUICK = Effort("quick", 12.0, Precision(min_runs=20))
FULL = Effort("full", 110.0, Precision())


class Progress(NamedTuple):
    """How far a calibration is: cells (point × batch size) known well enough, of all."""

    done: int
    total: int
    left_s: float


class Measured(NamedTuple):
    """Latencies by point, then batch. Batch sizes that did not fit the budget are left out."""

    latencies: tuple[Latency, ...]
    stopped_on: Stop


@dataclass(slots=True)
class _Cell:
    """One point at one batch size, and its runs so far."""

    point: int
    batch: int
    rounds: list[list[float]] = field(default_factory=list)  # ms
    known: Latency | None = None  # when precise
    next_check: int = _MIN_ROUNDS

    def typical_s(self) -> float:
        return float(np.median(self.rounds[-1])) / 1e3


def profile(
    engine: Engine,
    effort: Effort,
    *,
    batch_sizes: Sequence[int],
    compute_threads: int = 1,
    overhead_ms: float = 0.0,
    seed: int = 0,
    turn: Turn = lambda _: nullcontext(),
    progress: Callable[[Progress], object] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Profile:
    """Return the profile of an engine on this host: measured, then made monotone.

    Raises:
        CancelledError: `cancelled` said so.
    """
    shape = (max(batch_sizes), *engine.artifact.manifest.input.shape[1:])
    samples = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    measured = measure(
        lambda point, batch: engine.run(samples[:batch], point),
        range(len(engine.artifact.points)),
        batch_sizes,
        budget_s=effort.budget_s,
        precision=effort.precision,
        rng=random.Random(seed),
        clock=time.perf_counter,
        turn=turn,
        progress=progress,
        cancelled=cancelled,
    )
    latencies, dominated = smooth(measured.latencies)
    return Profile(
        key=engine.profile_key(compute_threads),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        kind=effort.kind,
        stopped_on=measured.stopped_on,
        overhead_ms=overhead_ms,
        latencies=latencies,
        dominated=dominated,
    )


def batch_sizes_to(largest: int) -> tuple[int, ...]:
    """Return the powers of two below `largest`, and it."""
    return (*(2**i for i in range((largest - 1).bit_length())), largest)


def measure(
    run: Run,
    points: Sequence[int],
    batch_sizes: Sequence[int],
    *,
    budget_s: float,
    precision: Precision,
    rng: random.Random,
    clock: Clock,
    turn: Turn = lambda _: nullcontext(),
    progress: Callable[[Progress], object] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Measured:
    """Return the latency of every point at every batch size that fits the budget.

    Rounds of trials, in a new random order each, so that a change of the host's speed falls on all
    points alike and widens the intervals. A cell leaves the rounds when its median is precise; all
    end when every cell has, or when the budget is spent. The smallest batch size is measured once
    whatever it takes.

    Raises:
        CancelledError: `cancelled` said so.
    """
    end_s = clock() + budget_s
    session = _Session(run, clock, turn, progress, cancelled, precision, rng)
    cells = session.first_round(points, sorted(batch_sizes), end_s)
    stopped_on = session.rounds(cells, end_s)
    cells.sort(key=lambda cell: (cell.point, cell.batch))
    found = (c.known or summary(c.point, c.batch, c.rounds, rng) for c in cells)
    return Measured(tuple(found), stopped_on)


@dataclass(frozen=True, slots=True)
class _Session:
    run: Run
    clock: Clock
    turn: Turn
    progress: Callable[[Progress], object]
    cancelled: Callable[[], bool]
    precision: Precision
    rng: random.Random

    def first_round(
        self, points: Sequence[int], batch_sizes: Sequence[int], end_s: float
    ) -> list[_Cell]:
        """Warm up and run each cell once, small batches first, to learn what the rest costs."""
        start_s = self.clock()
        limit_s = start_s + _FIRST_ROUND_SHARE * (end_s - start_s)
        cells: list[_Cell] = []
        total = len(points) * len(batch_sizes)
        previous_s, previous_batch = 0.0, 1
        for batch in batch_sizes:
            began_s = self.clock()
            if cells and began_s + previous_s * batch / previous_batch > limit_s:
                break
            for point in self.rng.sample(points, len(points)):
                cell = _Cell(point, batch)
                for _ in range(2):
                    self._trial(cell, 1)
                del cell.rounds[0]  # it warmed up
                cells.append(cell)
                self.progress(Progress(0, total, max(0.0, end_s - self.clock())))
            previous_s, previous_batch = self.clock() - began_s, batch
        return cells

    def rounds(self, cells: Sequence[_Cell], end_s: float) -> Stop:
        """Run rounds over the cells that are not yet precise; return what ended them."""
        while open_cells := [cell for cell in cells if not cell.known]:
            self.rng.shuffle(open_cells)
            for cell in open_cells:
                runs = max(1, min(_MAX_RUNS, int(_TRIAL_S / cell.typical_s())))
                if self.clock() + (runs + 1) * cell.typical_s() > end_s:
                    return "time"
                self._trial(cell, runs + (runs > 1))
                self._check(cell)
            done = sum(cell.known is not None for cell in cells)
            self.progress(Progress(done, len(cells), max(0.0, end_s - self.clock())))
        return "precision"

    def _trial(self, cell: _Cell, runs: int) -> None:
        """Run a cell a few times in one turn. Of several runs the first only fills the caches."""
        if self.cancelled():
            raise CancelledError
        times_ms = []
        with self.turn(runs * cell.typical_s() if cell.rounds else _TRIAL_S):
            for _ in range(runs):
                began_s = self.clock()
                self.run(cell.point, cell.batch)
                times_ms.append((self.clock() - began_s) * 1e3)
        cell.rounds.append(times_ms[1:] or times_ms)

    def _check(self, cell: _Cell) -> None:
        """Look at the interval each time a fifth more rounds are in: resampling costs time too."""
        if len(cell.rounds) < cell.next_check:
            return
        cell.next_check = len(cell.rounds) + max(1, len(cell.rounds) // 5)
        found = summary(cell.point, cell.batch, cell.rounds, self.rng)
        cell.known = found if self.precision.is_met(found) else None


def summary(
    point: int, batch: int, rounds: Sequence[Sequence[float]], rng: random.Random
) -> Latency:
    """Return the quantiles of all runs, ms, and the median's 95 % interval over whole rounds.

    Runs of one round share the state of the host, so rounds are resampled, not runs (cluster
    bootstrap): a host that changed its speed in between shows as a wide interval.
    """
    runs = np.concatenate([np.asarray(times, dtype=float) for times in rounds])
    p50, p90, p95, p99 = np.quantile(runs, _QUANTILES).tolist()
    low, high = np.quantile(_resampled_medians(rounds, rng), (0.025, 0.975)).tolist()
    low, high = min(low, p50), max(high, p50)
    return Latency(point, batch, p50, p90, p95, p99, len(runs), low, high)


def _resampled_medians(
    rounds: Sequence[Sequence[float]], rng: random.Random
) -> npt.NDArray[np.float64]:
    """Return medians over resampled rounds, (resamples,), each run weighted by its round's size."""
    values = np.concatenate([np.asarray(times, dtype=float) for times in rounds])
    owner = np.repeat(np.arange(len(rounds)), [len(times) for times in rounds])
    drawn = np.random.default_rng(rng.getrandbits(32)).multinomial(
        len(rounds), np.full(len(rounds), 1 / len(rounds)), size=_RESAMPLES
    )
    order = np.argsort(values)
    below = np.cumsum(drawn[:, owner[order]], axis=1)
    middle = (below >= below[:, -1:] / 2).argmax(axis=1)
    medians: npt.NDArray[np.float64] = values[order][middle]
    return medians
