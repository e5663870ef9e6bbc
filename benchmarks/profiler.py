"""Measures how long each point takes at each batch size, on this host, in this process.

Serving and calibration stay clean of each other because a trial, one run, happens only inside a
*turn*, which the server hands out: the turn excludes every other computation of the process while
the trial runs, so that none is in a measured time, and it is given only when no request waits; a
request that arrives during a trial interrupts it, and the trial is made again.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import fmean
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.effort import (
    CancelledError,
    Effort,
    Precision,
    Progress,
    TooLittleTimeError,
)
from benchmarks.smoothing import smooth
from benchmarks.tails import steadied
from maestro_core.host import Elsewhere
from maestro_core.profile import Latency, Profile, Stop
from server.engine import Engine
from server.interrupt import Interrupt, InterruptedRunError
from server.worker import Turns

Run = Callable[[int, int, Interrupt], object]  # point, batch, what ends it early
Clock = Callable[[], float]  # monotonic seconds
# The seconds that it will take, 0: unknown; those that it may be put off at most.
Turn = Callable[[float, float], AbstractContextManager[Interrupt]]

_BLOCK_S = 0.1  # runs so near in time share the state of the host
_MIN_BLOCKS = 10
_RANGE_BLOCKS = 6  # of fewer, the range holds the median more surely than 95 %
_RESAMPLES = 200
# A round runs so many cells at least, if there are. Among few, the last to be known would find
# their caches warm, as no request does that comes after some of other points, and never settle.
_COMPANY = 16
_FIRST_ROUND_SHARE = 0.5  # of the budget: larger batches that don't fit it are dropped
_QUANTILES = (0.5, 0.9, 0.95, 0.99)


class Measured(NamedTuple):
    """Latencies by point, then batch. Batch sizes that did not fit the budget are left out."""

    latencies: tuple[Latency, ...]
    stopped_on: Stop


@dataclass(slots=True)
class _Cell:
    """One point at one batch size, and its runs so far."""

    point: int
    batch: int
    blocks: list[list[float]] = field(default_factory=list)  # ms
    block_began_s: float = -math.inf
    known: Latency | None = None  # when precise
    next_check: int = _MIN_BLOCKS

    def add(self, began_s: float, ended_s: float) -> None:
        if began_s - self.block_began_s >= _BLOCK_S:
            self.blocks.append([])
            self.block_began_s = began_s
        self.blocks[-1].append((ended_s - began_s) * 1e3)

    def forget(self) -> None:
        self.blocks.clear()
        self.block_began_s = -math.inf

    def runs(self) -> int:
        return sum(map(len, self.blocks))

    def typical_s(self) -> float:
        return float(np.median(self.blocks[-1])) / 1e3


def alone(_takes_s: float, _most_s: float) -> AbstractContextManager[Interrupt]:
    """Return a turn where nobody else computes, and nobody interrupts."""
    return nullcontext(Interrupt())


def profile(
    engine: Engine,
    effort: Effort,
    *,
    batch_sizes: Sequence[int],
    compute_threads: int = 1,
    workers: int = 1,
    seed: int = 0,
    turn: Turn = alone,
    progress: Callable[[Progress], object] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
    largest_in_use: int = 0,
) -> Profile:
    """Return the profile of an engine on this host: measured, then made monotone.

    What a request costs outside the engine is not measured here (`server.overhead`): it says 0.

    Raises:
        CancelledError: `cancelled` said so.
        TooLittleTimeError: a batch size up to `largest_in_use` does not fit the effort.
    """
    shape = (max(batch_sizes), *engine.artifact.manifest.input.shape[1:])
    samples = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    elsewhere = Elsewhere()
    measured = measure(
        lambda point, batch, interrupt: engine.run(samples[:batch], point, interrupt),
        range(len(engine.artifact.points)),
        batch_sizes,
        budget_s=effort.budget_s,
        precision=effort.precision,
        rng=random.Random(seed),
        clock=time.perf_counter,
        turn=turn,
        progress=progress,
        cancelled=cancelled,
        largest_in_use=largest_in_use,
    )
    accuracy = [point.score.value for point in engine.artifact.points]
    latencies, dominated = smooth(measured.latencies, accuracy)
    return Profile(
        key=engine.profile_key(compute_threads, workers),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        kind=effort.kind,
        stopped_on=measured.stopped_on,
        overhead_ms=0.0,
        latencies=latencies,
        dominated=dominated,
        cores_used_by_others=elsewhere.share(),
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
    turn: Turn = alone,
    progress: Callable[[Progress], object] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
    largest_in_use: int = 0,
) -> Measured:
    """Return the latency of every point at every batch size that fits the budget.

    Tails lean on those of like cells (`benchmarks.tails`).

    Rounds of single runs, in a new random order each, so that a change of the host's speed falls
    on all points alike and widens the intervals. A cell leaves the rounds when its median is
    precise; all end when every cell has, or when the budget is spent. The smallest batch size is
    measured once whatever it takes.

    Raises:
        CancelledError: `cancelled` said so.
        TooLittleTimeError: a batch size up to `largest_in_use` does not fit the budget.
    """
    end_s = clock() + budget_s
    session = _Session(run, clock, turn, progress, cancelled, largest_in_use, precision, rng)
    cells = session.first_round(points, sorted(batch_sizes), end_s)
    stopped_on = session.rounds(cells, end_s)
    cells.sort(key=lambda cell: (cell.point, cell.batch))
    found = [c.known or summary(c.point, c.batch, c.blocks, rng) for c in cells]
    runs_ms = [np.concatenate(cell.blocks) for cell in cells]
    return Measured(tuple(steadied(found, runs_ms)), stopped_on)


@dataclass(frozen=True, slots=True)
class _Session:
    run: Run
    clock: Clock
    turn: Turn
    progress: Callable[[Progress], object]
    cancelled: Callable[[], bool]
    largest_in_use: int
    precision: Precision
    rng: random.Random

    def first_round(
        self, points: Sequence[int], batch_sizes: Sequence[int], end_s: float
    ) -> list[_Cell]:
        """Warm up and run each cell once, small batches first, to learn what the rest costs."""
        start_s = self.clock()
        limit_s = start_s + _FIRST_ROUND_SHARE * (end_s - start_s)
        cells: list[_Cell] = []
        trials_to_go = 2 * len(points) * len(batch_sizes)
        pass_s = trial_s = 0.0  # of which a pass waits for its turns, too
        previous = batch_sizes[0]
        for batch in batch_sizes:
            growth = batch / previous
            # A pass that waited longer, for gaps between requests, need not: `_trial`.
            needs_s = min(pass_s, len(points) * trial_s / Turns.TRIAL_SHARE)
            if cells and self.clock() + 2 * growth * needs_s > limit_s:
                if batch <= self.largest_in_use:
                    raise TooLittleTimeError(
                        f"there was no time for batches of {batch}, which are in use: the profile "
                        "stays as it was; take more time, or try when fewer requests come"
                    )
                break
            row = [_Cell(point, batch) for point in points]
            expected_s = growth * trial_s
            for _ in range(2):
                began_s = self.clock()
                for cell in self.rng.sample(row, len(row)):
                    cell.forget()  # what warmed it up
                    self._trial(cell, expected_s, limit_s, trials_to_go)
                    trials_to_go -= 1
                pass_s = self.clock() - began_s
            trial_s, previous = fmean(cell.typical_s() for cell in row), batch
            cells += row
            total = len(points) * len(batch_sizes)
            self.progress(Progress(0, total, max(0.0, end_s - self.clock())))
        return cells

    def rounds(self, cells: Sequence[_Cell], end_s: float) -> Stop:
        """Run rounds over the cells that are not yet precise; return what ended them."""
        while open_cells := [cell for cell in cells if not cell.known]:
            closed = [cell for cell in cells if cell.known]
            missing = max(0, _COMPANY - len(open_cells))
            company = sorted(closed, key=_Cell.typical_s)[:missing]  # those that cost least
            for cell in self.rng.sample(open_cells + company, len(open_cells) + len(company)):
                if self.clock() + cell.typical_s() > end_s:
                    return "time"
                self._trial(cell, cell.typical_s(), end_s)
                if not cell.known:
                    self._check(cell)
            done = sum(cell.known is not None for cell in cells)
            self.progress(Progress(done, len(cells), max(0.0, end_s - self.clock())))
        return "precision"

    def _trial(self, cell: _Cell, expected_s: float, end_s: float, to_go: int = 1) -> None:
        """Run a cell once. Other cells ran before it, as other requests do when it is served.

        It is put off for its share of the time until `end_s` at most, of those that are `to_go`.
        """
        while not self.cancelled():
            most_s = max(0.0, end_s - self.clock()) / to_go
            with self.turn(expected_s, most_s) as interrupt, suppress(InterruptedRunError):
                began_s = self.clock()
                self.run(cell.point, cell.batch, interrupt)
                cell.add(began_s, self.clock())
                return
        raise CancelledError

    def _check(self, cell: _Cell) -> None:
        """Look at the interval each time a fifth more runs are in: resampling costs time too."""
        runs = cell.runs()
        if runs < cell.next_check or len(cell.blocks) < _MIN_BLOCKS:
            return
        cell.next_check = runs + max(1, runs // 5)
        found = summary(cell.point, cell.batch, cell.blocks, self.rng)
        cell.known = found if self.precision.is_met(found) else None


def summary(
    point: int, batch: int, blocks: Sequence[Sequence[float]], rng: random.Random
) -> Latency:
    """Return the quantiles of all runs, ms, and the median's 95 % interval over whole blocks.

    Runs of one block share the state of the host, so blocks are resampled, not runs (cluster
    bootstrap): a host that changed its speed in between shows as a wide interval. Of blocks too few
    for that it is the range of the runs.
    """
    runs = np.concatenate([np.asarray(times, dtype=float) for times in blocks])
    p50, p90, p95, p99 = np.quantile(runs, _QUANTILES).tolist()
    if len(blocks) < _RANGE_BLOCKS:
        low, high = float(runs.min()), float(runs.max())
    else:
        low, high = np.quantile(_resampled_medians(blocks, rng), (0.025, 0.975)).tolist()
    low, high = min(low, p50), max(high, p50)
    return Latency(point, batch, p50, p90, p95, p99, len(runs), low, high)


def _resampled_medians(
    blocks: Sequence[Sequence[float]], rng: random.Random
) -> npt.NDArray[np.float64]:
    """Return medians, (resamples,), of runs counted as often as their block was drawn."""
    values = np.concatenate([np.asarray(times, dtype=float) for times in blocks])
    owner = np.repeat(np.arange(len(blocks)), [len(times) for times in blocks])
    drawn = np.random.default_rng(rng.getrandbits(32)).multinomial(
        len(blocks), np.full(len(blocks), 1 / len(blocks)), size=_RESAMPLES
    )
    order = np.argsort(values)
    below = np.cumsum(drawn[:, owner[order]], axis=1)
    middle = (below >= below[:, -1:] / 2).argmax(axis=1)
    medians: npt.NDArray[np.float64] = values[order][middle]
    return medians
