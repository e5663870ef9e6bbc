"""`maestro bench engine`: all points in one engine, against each exported alone.

Of two networks of random weights, whose chains are made so that little or much is shared, and of
ARTIFACT, whose chain training found. Weights mapped from the baked file, and copied to huge pages.
Memory in processes of their own; speed and switching side by side in one process, interleaved.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from benchmarks import arguments, networks, report
from benchmarks.effort import Precision
from benchmarks.memory import grown_mib, inline
from benchmarks.profiler import measure
from maestro_core import artifact
from maestro_core.artifact import Artifact
from maestro_core.host import Elsewhere
from maestro_core.profile import Latency
from server.engine import Engine, session_options
from server.interrupt import Interrupt
from server.settings import shipped_artifact

POINTS = 16
BATCHES = (1, 8)
WAYS: dict[str, Literal["always", "never"]] = {"mapped": "never", "huge_pages": "always"}
STRIDE = 4  # a layer of the staggered chain grows at every fourth point


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the result, and write it where `--out` says."""
    parser = argparse.ArgumentParser(prog="maestro bench engine", description=__doc__)
    parser.add_argument("artifact", type=Path, nargs="?", default=shipped_artifact())
    parser.add_argument(
        "--budget-s", type=arguments.positive, default=90.0, help="for speed, per network"
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS / "engine.json")
    chosen = parser.parse_args(argv)
    trained = artifact.load(chosen.artifact)
    elsewhere = Elsewhere()
    result: dict[str, Any] = {**report.conditions(), "intra_op_threads": 1, "points": POINTS}
    with tempfile.TemporaryDirectory() as folder:
        for make in (networks.resnet18, networks.encoder):
            network = make()
            state_dir = Path(folder) / network.name
            uniform = network.save(state_dir / "uniform.maestro", network.uniform_chain(POINTS))
            staggered = network.save(
                state_dir / "staggered.maestro", network.staggered_chain(POINTS, STRIDE)
            )
            result[network.name] = {
                **compared(uniform, state_dir, chosen.budget_s),
                "staggered_memory_mib": _memory(staggered, state_dir),
            }
        state_dir = Path(folder) / "trained"
        state_dir.mkdir()
        result[trained.manifest.name] = {
            "points": len(trained.points),
            **compared(trained, state_dir, chosen.budget_s),
        }
    result["cores_used_by_others"] = elsewhere.share()
    report.write(result, chosen.out)


def compared(model: Artifact, state_dir: Path, budget_s: float) -> dict[str, Any]:
    """Return memory, speed, switching, and the cost of a point that is not in memory."""
    began_s = time.perf_counter()
    cold = Engine(model, state_dir=state_dir, memory_budget_bytes=0)  # bakes, and loads nothing
    baked_s = time.perf_counter() - began_s
    memory = _memory(model, state_dir)  # before this process maps the same pages
    engines = {
        way: Engine(model, state_dir=state_dir, huge_pages=when) for way, when in WAYS.items()
    }
    return {
        "bake_s": round(baked_s, 2),
        "default": "huge_pages" if Engine(model, state_dir=state_dir).has_huge_pages else "mapped",
        "memory_mib": memory,
        "speed": _speed(engines, state_dir, budget_s),
        "switching": _switching(engines, budget_s / 2),
        "cold_start_ms": _cold_start_ms(cold, engines["mapped"]),
    }


def _memory(model: Artifact, state_dir: Path) -> dict[str, Any]:
    """Return MiB by way: the dearest point alone, and all points; and ours over one alone."""
    batch, every = BATCHES[-1], len(model.points)
    Engine(model, state_dir=state_dir, memory_budget_bytes=0)  # bakes where it is missing
    found: dict[str, Any] = {"batch": batch}
    largest = found["alone_largest"] = grown_mib(model.path, "alone", 1, batch, state_dir)
    found["alone_all"] = grown_mib(model.path, "alone", every, batch, state_dir)
    for way, when in WAYS.items():
        grown = found[f"{way}_all"] = grown_mib(model.path, when, every, batch, state_dir)
        for kind in grown:
            found[f"{way}_all_over_largest_alone_{kind}"] = round(grown[kind] / largest[kind], 3)
    return found


def _speed(engines: Mapping[str, Engine], state_dir: Path, budget_s: float) -> dict[str, Any]:
    """Return each point's latency in each engine over that of its own export."""
    model = next(iter(engines.values())).artifact
    points = range(len(model.points))
    alone = [ort.InferenceSession(inline(model, i, state_dir), session_options(1)) for i in points]
    tensor, x = model.manifest.input.name, _samples(model, BATCHES[-1])
    ways = ["alone", *engines]

    def run(index: int, batch: int, _: Interrupt) -> object:
        point, way = divmod(index, len(ways))
        samples = x[:batch]
        if way == 0:
            return alone[point].run(None, {tensor: samples})
        return engines[ways[way]].run(samples, point)

    measured = measure(
        run,
        range(len(ways) * len(points)),
        BATCHES,
        budget_s=budget_s,
        precision=Precision(relative=0.005, absolute_ms=0.0),
        rng=random.Random(0),
        clock=time.perf_counter,
    )
    cells = {(*divmod(cell.point, len(ways)), cell.batch): cell for cell in measured.latencies}
    if len(cells) < len(ways) * len(points) * len(BATCHES):
        raise ValueError(f"--budget-s {budget_s:g} leaves no time for each point of {model.path}")
    found: dict[str, Any] = {"stopped_on": measured.stopped_on}
    for way, name in enumerate(engines, 1):
        rows = [
            _compared(point, batch, cells[point, way, batch], cells[point, 0, batch])
            for batch in BATCHES
            for point in points
        ]
        found[name] = _over_alone(rows)
    return found


def _over_alone(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the cells of one engine say together.

    "dense" is the last point, exported alone; the dense network for the two of random weights.
    """
    ratios = [row["ratio"] for row in rows]
    last = max(row["point"] for row in rows)
    dense_ms = {row["batch"]: row["alone_p50_ms"] for row in rows if row["point"] == last}
    return {
        "median_ratio": round(median(ratios), 3),
        "max_ratio": max(ratios),
        "over_1.05": sum(ratio > 1.05 for ratio in ratios),
        "slower_than_dense_by_2_percent": [
            row["point"] for row in rows if row["engine_p50_ms"] > 1.02 * dense_ms[row["batch"]]
        ],
        "cells": rows,
    }


def _compared(point: int, batch: int, ours: Latency, alone: Latency) -> dict[str, Any]:
    return {
        "point": point,
        "batch": batch,
        "engine_p50_ms": round(ours.p50_ms, 4),
        "alone_p50_ms": round(alone.p50_ms, 4),
        "ratio": round(ours.p50_ms / alone.p50_ms, 3),
        "interval": [
            round(ours.p50_low_ms / alone.p50_high_ms, 3),
            round(ours.p50_high_ms / alone.p50_low_ms, 3),
        ],
        "n": [ours.n, alone.n],
    }


def _switching(engines: Mapping[str, Engine], budget_s: float) -> dict[str, Any]:
    """Return the latency of requests at random points over the same requests point by point.

    And that of the random ones in each engine over those in the first.
    """
    rng = random.Random(0)
    model = next(iter(engines.values())).artifact
    x = _samples(model, 1)
    points = range(len(model.points))
    mixed: dict[str, list[list[float]]] = {way: [[] for _ in points] for way in engines}
    sorted_: dict[str, list[list[float]]] = {way: [[] for _ in points] for way in engines}
    end_s = time.perf_counter() + budget_s
    while time.perf_counter() < end_s:
        for way in rng.sample(list(engines), len(engines)):
            requests = [point for point in points for _ in range(4)]
            orders = [(sorted_, requests), (mixed, rng.sample(requests, len(requests)))]
            rng.shuffle(orders)
            for times, order in orders:
                for point in order:
                    began_s = time.perf_counter()
                    engines[way].run(x, point)
                    times[way][point].append(time.perf_counter() - began_s)
    first = next(iter(engines))
    found: dict[str, Any] = {"requests": sum(map(len, mixed[first]))}
    for way in engines:
        ratios = [median(mixed[way][p]) / median(sorted_[way][p]) for p in points]
        over_first = median(median(mixed[way][p]) / median(mixed[first][p]) for p in points)
        found[way] = {
            "median_ratio": round(median(ratios), 3),
            f"mixed_over_{first}": round(over_first, 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    return found


def _cold_start_ms(cold: Engine, warm: Engine) -> dict[str, float]:
    """Return what a run costs more when its point has to be loaded, over all points."""
    x = _samples(cold.artifact, 1)
    points = range(len(cold.artifact.points))
    extra_ms = []
    for point in [*points, *points]:
        times = []
        for engine in (cold, warm):
            began_s = time.perf_counter()
            engine.run(x, point)
            times.append(1e3 * (time.perf_counter() - began_s))
        extra_ms.append(times[0] - times[1])
    return {"median": round(median(extra_ms), 2), "max": round(max(extra_ms), 2)}


def _samples(model: Artifact, batch: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    shape = (batch, *model.manifest.input.shape[1:])
    return np.random.default_rng(0).standard_normal(shape, np.float32)


if __name__ == "__main__":
    main()
