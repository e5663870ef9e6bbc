"""`maestro bench prediction`: what a profile predicts against what is measured after it.

A full profile, then random (point, batch) pairs, profiled batch sizes or not, run in interleaved
random order. A prediction holds when it is within 10 % of what is then measured.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arguments, networks, profiler, report
from benchmarks.effort import FULL, Effort
from maestro_core import artifact
from maestro_core.host import Elsewhere
from maestro_core.profile import Profile
from server.engine import Engine

PAIRS = 30
MAX_BATCH = 16
WITHIN = 0.1


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the result, and write it where `--out` says."""
    parser = argparse.ArgumentParser(prog="maestro bench prediction", description=__doc__)
    parser.add_argument(
        "artifact", type=Path, nargs="?", help="ResNet-18 of random weights if none"
    )
    parser.add_argument("--runs", type=arguments.count, default=100, help="of each pair")
    parser.add_argument("--budget-s", type=arguments.positive, default=FULL.budget_s)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "prediction.json")
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if chosen.artifact:
            model = artifact.load(chosen.artifact)
        else:
            network = networks.resnet18()
            path = Path(folder) / f"{network.name}.maestro"
            model = network.save(path, network.uniform_chain(16))
        engine = Engine(model, state_dir=Path(folder))
        effort = Effort("full", chosen.budget_s, FULL.precision)
        sizes = profiler.batch_sizes_to(MAX_BATCH)
        profile = profiler.profile(engine, effort, batch_sizes=sizes)
        elsewhere = Elsewhere()
        found = checked(engine, profile, chosen.runs, seed=1)
        result = {
            **report.conditions(),
            "artifact": model.manifest.name,
            "profile": {"stopped_on": profile.stopped_on, "batch_sizes": profile.batch_sizes},
            "cores_used_by_others": {
                "profile": profile.cores_used_by_others,
                "check": elsewhere.share(),
            },
            **found,
        }
    report.write(result, chosen.out)


def checked(engine: Engine, profile: Profile, runs: int, seed: int) -> dict[str, Any]:
    """Return how many predictions of p50 and p95 hold, and each of them."""
    rng = random.Random(seed)
    pairs = [
        (rng.choice(profile.points), rng.randint(1, profile.batch_sizes[-1])) for _ in range(PAIRS)
    ]
    times_ms = _measured(engine, pairs, runs, rng)
    rows = [_row(profile, pair, times) for pair, times in zip(pairs, times_ms, strict=True)]
    return {
        "pairs": PAIRS,
        "runs": runs,
        "p50_within_10_percent": sum(abs(row["p50_error"]) <= WITHIN for row in rows),
        "p95_within_10_percent": sum(abs(row["p95_error"]) <= WITHIN for row in rows),
        "predictions": rows,
    }


def _measured(
    engine: Engine, pairs: Sequence[tuple[int, int]], runs: int, rng: random.Random
) -> list[list[float]]:
    shape = (MAX_BATCH, *engine.artifact.manifest.input.shape[1:])
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    times_ms: list[list[float]] = [[] for _ in pairs]
    for _ in range(runs):
        for i in rng.sample(range(len(pairs)), len(pairs)):
            point, batch = pairs[i]
            began_s = time.perf_counter()
            engine.run(x[:batch], point)
            times_ms[i].append(1e3 * (time.perf_counter() - began_s))
    return times_ms


def _row(profile: Profile, pair: tuple[int, int], times_ms: Sequence[float]) -> dict[str, Any]:
    point, batch = pair
    row: dict[str, Any] = {"point": point, "batch": batch, "n": len(times_ms)}
    for quantile in (50, 95):
        predicted = profile.quantile_ms(point, batch, quantile)
        measured = float(np.percentile(times_ms, quantile))
        row[f"p{quantile}_predicted_ms"] = round(predicted, 4)
        row[f"p{quantile}_measured_ms"] = round(measured, 4)
        row[f"p{quantile}_error"] = round(predicted / measured - 1, 3)
    return row


if __name__ == "__main__":
    main()
