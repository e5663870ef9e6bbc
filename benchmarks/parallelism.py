"""How many threads compute a batch: measured on the host, once.

One batch computes at a time (`maestro bench slots`: two at once, on half the threads each, answer
some per cent more requests and take twice as long for each).
"""

import json
import random
import time
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from statistics import geometric_mean

import numpy as np

from benchmarks.effort import Precision
from benchmarks.profiler import batch_sizes_to, measure
from maestro_core.artifact import Artifact
from maestro_core.host import usable_cores
from maestro_core.locking import locked
from maestro_core.writing import write_atomically
from server.engine import Engine
from server.interrupt import Interrupt

_BUDGET_S = 2.0
# A thread more must pay: what it leaves is needed to read requests and write answers.
_TOLERANCE = 0.05


def best_threads(
    artifact: Artifact, state_dir: Path | None, cores: int = 0, workers: int = 1
) -> int:
    """Return the best for an artifact on this host's cores (0: all), from the store or measured.

    The fewest with the lowest latency at the cheapest, middle and dearest point. Workers measure
    at once, as they compute at once; what the first of them stores is what all return.
    """
    cores = cores or usable_cores(workers)
    engine = Engine(artifact, state_dir=state_dir, memory_budget_bytes=0)
    host = json.dumps([asdict(engine.profile_key(0, workers)), cores], sort_keys=True)
    name = sha256(host.encode()).hexdigest()[:16]
    path = state_dir / "parallelism" / f"{name}.json" if state_dir else None
    found = _stored(path, cores)
    if found is None:
        found = _measured(artifact, state_dir, cores)
        found = _first_stored(path, found, cores)
    return found


def fewest(costs: Mapping[int, float]) -> int:
    """Return the smallest count whose cost is within a few per cent of the lowest."""
    lowest = min(costs.values())
    return min(count for count, cost in costs.items() if cost <= lowest * (1 + _TOLERANCE))


def _measured(artifact: Artifact, state_dir: Path | None, cores: int) -> int:
    if cores == 1:
        return 1
    counts = batch_sizes_to(cores)
    engines = [Engine(artifact, intra_op_threads=n, state_dir=state_dir) for n in counts]
    last = len(artifact.points) - 1
    points = sorted({0, last // 2, last})
    x = np.ones((1, *artifact.manifest.input.shape[1:]), np.float32)

    def run(index: int, _batch: int, interrupt: Interrupt) -> object:
        engine, point = divmod(index, len(points))
        return engines[engine].run(x, points[point], interrupt)

    latencies = measure(
        run,
        range(len(engines) * len(points)),
        (1,),
        budget_s=_BUDGET_S,
        precision=Precision(min_runs=30),
        rng=random.Random(0),
        clock=time.perf_counter,
    ).latencies
    p50 = [latency.p50_ms for latency in latencies]
    width = len(points)
    costs = {n: geometric_mean(p50[i * width : (i + 1) * width]) for i, n in enumerate(counts)}
    return fewest(costs)


def _stored(path: Path | None, cores: int) -> int | None:
    """Return what was measured before; what is missing or damaged is measured again."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["intra_op_threads"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if isinstance(found, int) and 1 <= found <= cores else None


def _first_stored(path: Path | None, found: int, cores: int) -> int:
    """Store what was measured, unless another process was first; return what is stored."""
    if path is None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            stored = _stored(path, cores)
            if stored is None:
                write_atomically(path, json.dumps({"intra_op_threads": found}).encode())
            return stored or found
    except OSError:
        return found  # measured again at the next start
