"""`maestro bench calibration`: serving while calibrating, and calibrating while serving.

Requests arrive at random (open loop, from the intended time) at one worker that shares turns with
a calibration, as in the server; each is compared with the same without the other.
"""

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import networks, profiler, report
from benchmarks.profiler import CancelledError, Effort
from maestro_core.profile import Profile
from server.engine import Engine
from server.worker import Turns

POINT = 3
BATCH_SIZES = (1, 2, 4)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the result, and write it where `--out` says."""
    parser = argparse.ArgumentParser(prog="maestro bench calibration", description=__doc__)
    parser.add_argument("--load", type=float, default=0.2, help="share of time spent serving")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each part")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "calibration.json")
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        network = networks.resnet18()
        model = network.save(Path(folder) / "resnet18.maestro", network.uniform_chain(8))
        engine = Engine(model, state_dir=Path(folder))
        result = {
            **report.conditions(),
            "artifact": model.manifest.name,
            "point": POINT,
            "batch_sizes": BATCH_SIZES,
            **compared(engine, chosen.load, chosen.seconds),
        }
    report.write(result, chosen.out)


def compared(engine: Engine, load: float, seconds: float) -> dict[str, Any]:
    """Return response times with and without a calibration, and profiles with and without load."""
    effort = Effort("full", seconds, profiler.FULL.precision)
    quiet = _calibrated(engine, effort, Turns(), lambda: False)
    run_s = quiet.row(POINT)[0].p50_ms / 1e3
    rate = load / run_s
    alone_ms = _served(engine, Turns(), rate, seconds)
    turns, ended = Turns(), threading.Event()
    busy: list[Profile] = []

    def calibrate() -> None:
        while not ended.is_set():
            try:
                busy.append(_calibrated(engine, effort, turns, ended.is_set))
            except CancelledError:
                return

    thread = threading.Thread(target=calibrate)
    thread.start()
    beside_ms = _served(engine, turns, rate, seconds + 2)
    ended.set()
    thread.join()
    quiet_ms = {(x.point, x.batch): x.p50_ms for x in quiet.latencies}
    ratios = [x.p50_ms / quiet_ms[x.point, x.batch] for x in busy[0].latencies]
    return {
        "load": load,
        "requests_per_s": round(rate, 1),
        "alone": _quantiles(alone_ms),
        "beside_a_calibration": _quantiles(beside_ms),
        "longest_trial_p50_ms": round(max(x.p50_ms for x in quiet.latencies), 2),
        "profile_under_load_over_quiet": {
            "batch_sizes": busy[0].batch_sizes,
            "stopped_on": busy[0].stopped_on,
            "median": round(median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        },
    }


def _calibrated(
    engine: Engine, effort: Effort, turns: Turns, cancelled: Callable[[], bool]
) -> Profile:
    return profiler.profile(
        engine, effort, batch_sizes=BATCH_SIZES, turn=turns.trial, cancelled=cancelled
    )


def _served(engine: Engine, turns: Turns, rate: float, seconds: float) -> list[float]:
    """Return response times, ms, of requests that arrive `rate` times a second at random."""
    rng = random.Random(0)
    x = np.ones((1, *engine.artifact.manifest.input.shape[1:]), np.float32)
    times_ms = []
    began_s = time.perf_counter()
    due_s = began_s
    while (due_s := due_s + rng.expovariate(rate)) < began_s + seconds:
        if (wait_s := due_s - time.perf_counter()) > 0:
            turns.set_idle(True)
            time.sleep(wait_s)
        turns.set_idle(False)
        with turns.computing:
            engine.run(x, POINT)
        times_ms.append(1e3 * (time.perf_counter() - due_s))
    turns.set_idle(True)
    return times_ms


def _quantiles(times_ms: Sequence[float]) -> dict[str, Any]:
    p50, p95, p99 = np.percentile(times_ms, (50, 95, 99)).round(2).tolist()
    return {"n": len(times_ms), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


if __name__ == "__main__":
    main()
