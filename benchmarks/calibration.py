"""`maestro bench calibration`: serving while calibrating, and calibrating while serving.

Requests arrive at random (open loop, from the intended time) at one worker that shares turns with
a calibration, as in the server. It is held back for five seconds in every ten; both are compared.
"""

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import arguments, networks, profiler, report
from benchmarks.effort import FULL, CancelledError, Effort
from maestro_core.profile import Profile
from server.engine import Engine
from server.interrupt import Interrupt
from server.worker import Turns

POINT = 3
BATCH_SIZES = (1, 2, 4, 8)
_WINDOW_S = 5.0


class _Gate:
    """Holds trials back while it is closed. That time does not count as one that they gave way."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._may_pass = threading.Event()
        self._open_before_s = 0.0
        self._opened_s = 0.0

    def open(self) -> None:
        if not self._may_pass.is_set():
            self._opened_s = self._clock()
            self._may_pass.set()

    def close(self) -> None:
        if self._may_pass.is_set():
            open_s = self.open_s()
            self._may_pass.clear()
            self._open_before_s = open_s  # who asks in between is told less: trials wait longer

    def wait(self) -> None:
        self._may_pass.wait()

    def open_s(self) -> float:
        """Return the seconds that it was open for."""
        now_s = self._clock() - self._opened_s if self._may_pass.is_set() else 0.0
        return self._open_before_s + now_s


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the result, and write it where `--out` says."""
    parser = argparse.ArgumentParser(prog="maestro bench calibration", description=__doc__)
    parser.add_argument(
        "--load", type=arguments.positive, default=0.2, help="share of time spent serving"
    )
    parser.add_argument("--seconds", type=arguments.positive, default=120.0, help="of serving")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "calibration.json")
    chosen = parser.parse_args(argv)
    if chosen.load >= 1:
        raise ValueError(f"--load is {chosen.load:g}, not below 1: it would leave no pause")
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
    effort = Effort("full", seconds / 4, FULL.precision)
    quiet = _calibrated(engine, effort, Turns().trial)
    rate = load / (quiet.row(POINT)[0].p50_ms / 1e3)
    gate, ended = _Gate(time.perf_counter), threading.Event()
    turns = Turns(gate.open_s)
    busy: list[Profile] = []
    trials = {"finished": 0, "interrupted": 0}

    @contextmanager
    def gated(expected_s: float, most_s: float) -> Iterator[Interrupt]:
        gate.wait()
        with turns.trial(expected_s, most_s) as interrupt:
            yield interrupt
        trials["interrupted" if interrupt.is_set else "finished"] += 1

    def calibrate() -> None:
        effort = Effort("full", seconds, FULL.precision)
        busy.append(_calibrated(engine, effort, gated))
        with suppress(CancelledError):
            while True:
                _calibrated(engine, effort, gated, ended.is_set)

    thread = threading.Thread(target=calibrate)
    thread.start()
    alone_ms, beside_ms = _served(engine, turns, gate, rate, seconds + _WINDOW_S)
    ended.set()
    gate.open()
    thread.join()
    quiet_ms = {(x.point, x.batch): x.p50_ms for x in quiet.latencies}
    ratios = [x.p50_ms / quiet_ms[x.point, x.batch] for x in busy[0].latencies]
    return {
        "load": load,
        "requests_per_s": round(rate, 1),
        "alone": _quantiles(alone_ms),
        "beside_a_calibration": _quantiles(beside_ms),
        "trials": trials,
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
    engine: Engine,
    effort: Effort,
    turn: profiler.Turn,
    cancelled: Callable[[], bool] = lambda: False,
) -> Profile:
    return profiler.profile(engine, effort, batch_sizes=BATCH_SIZES, turn=turn, cancelled=cancelled)


def _served(
    engine: Engine, turns: Turns, gate: _Gate, rate: float, seconds: float
) -> tuple[list[float], list[float]]:
    """Return response times, ms, of requests that arrive `rate` times a second at random.

    Windows without (first) and with a calibration alternate, so that other work on the host
    falls on both.
    """
    rng = random.Random(0)
    x = np.ones((1, *engine.artifact.manifest.input.shape[1:]), np.float32)
    times_ms: tuple[list[float], list[float]] = ([], [])
    began_s = time.perf_counter()
    due_s = began_s
    while (due_s := due_s + rng.expovariate(rate)) < began_s + seconds:
        window = int((due_s - began_s) / _WINDOW_S) % 2
        if (wait_s := due_s - time.perf_counter()) > 0:
            turns.set_idle(True)
            time.sleep(wait_s)
        (gate.open if window else gate.close)()
        turns.set_idle(False)
        with turns.computing:
            engine.run(x, POINT)
        times_ms[window].append(1e3 * (time.perf_counter() - due_s))
    turns.set_idle(True)
    return times_ms


def _quantiles(times_ms: Sequence[float]) -> dict[str, Any]:
    p50, p95, p99 = np.percentile(times_ms, (50, 95, 99)).round(2).tolist()
    return {"n": len(times_ms), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


if __name__ == "__main__":
    main()
