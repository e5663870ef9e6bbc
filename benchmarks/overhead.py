"""`maestro bench overhead`: what a server adds to a network, ours beside others with the same one.

The floor is a FastAPI handler written by hand around ONNX Runtime. Every server is up all along, on
cores apart from the one that sends, and stands still while another is asked. A round takes the
loads in random order: one connection, sixteen, Poisson arrivals at a share of what the floor
answers over sixteen, and lone requests, each after a pause; and for each load all servers, one
right after the other, in random order too. Ratios are of one round, and medians over the rounds: a
host whose speed changes meanwhile changes both. All run the same point, from the same file, with as
many threads. Ours answers from `/infer` with that point named, everything else as it comes:
prediction, queue, metrics and headers included. A second one of ours, that is not kept warm while
nobody asks, gets the lone requests alone.
"""

import argparse
import asyncio
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import orjson
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import arguments, networks, report
from benchmarks.http_load import Call, Latencies, closed_loop, open_loop
from benchmarks.own_server import cores_apart, npy_sample, profiled
from benchmarks.own_server import server as our_server
from benchmarks.rival_server import FLOOR, PROGRAMS, MissingError, Started, rival
from maestro_core import artifact
from maestro_core.artifact import Artifact
from maestro_core.host import Elsewhere
from server.policy_names import OURS

FORMS = ("json", "npy")
MANY = 16
LONE = "lone"
LOADS = ("one", "many", "poisson", LONE)
# Between lone requests, and how many there are in a round.
PAUSE_S = 0.3
LONE_REQUESTS = 10
NOT_WARM = f"{OURS}, not kept warm"
QUIET = 0.1  # of the servers' cores in use
SETTLED_S = 30.0  # at most, before each load
# Where a server takes an input, by form; those that are not here take no binary body.
PATHS: Mapping[tuple[str, str], str] = {
    (FLOOR, "json"): "/infer",
    (FLOOR, "npy"): "/infer",
    (OURS, "json"): "/infer",
    (OURS, "npy"): "/infer",
    (NOT_WARM, "json"): "/infer",
    (NOT_WARM, "npy"): "/infer",
    ("mosec", "json"): "/inference",
    ("mosec", "npy"): "/inference",
    ("litserve", "json"): "/predict",
    ("bentoml", "json"): "/infer",
    ("mlserver", "json"): "/v2/models/model/infer",
}

Row = dict[str, Any]
Cell = tuple[str, str, str]  # server, form, load
Run = tuple[Latencies, float]  # of one round, and its seconds
Figure = Callable[[Run], float]
Signals = dict[str, Callable[[int], object]]  # what sends a signal to a server


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print the result and a table, write the result where `--out` says."""
    parser = argparse.ArgumentParser(prog="maestro bench overhead", description=__doc__)
    parser.add_argument(
        "artifact", type=Path, nargs="?", help="default: LeNet, which computes next to nothing"
    )
    parser.add_argument(
        "--rival",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"a Python that has a rival, of {', '.join(PROGRAMS)}; else this one is tried",
    )
    parser.add_argument(
        "--seconds", type=arguments.positive, default=4.0, help="of each load in each round"
    )
    parser.add_argument("--rounds", type=arguments.count, default=5)
    parser.add_argument("--share", type=float, default=0.6, help="of the floor's throughput")
    parser.add_argument("--quick", action="store_true", help="one round of half a second each")
    parser.add_argument("--out", type=Path, help="else results/overhead.json, but for --quick")
    chosen = parser.parse_args(argv)
    if chosen.quick:
        chosen.seconds, chosen.rounds = 0.5, 1
    if not 0 < chosen.share < 1:
        raise ValueError(f"--share is {chosen.share}, not in (0, 1)")
    pythons = {FLOOR: sys.executable, **dict.fromkeys(PROGRAMS, sys.executable)}
    pythons |= _pythons(chosen.rival)
    elsewhere = Elsewhere()
    missing: dict[str, str] = {}
    rivals: dict[str, Started] = {}
    with cores_apart() as (sending, serving), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = artifact.load(chosen.artifact) if chosen.artifact else _lenet(folder)
        point = max(range(len(model.points)), key=lambda i: model.points[i].score.value)
        profiled(model, folder, serving, quick=chosen.quick)
        kept_warm = our_server(model, folder, OURS, serving, MAESTRO_KEEP_WARM_MS="100")
        ours = stack.enter_context(kept_warm)
        ours_too = stack.enter_context(our_server(model, folder, OURS, serving))
        addresses = {OURS: ours.address, NOT_WARM: ours_too.address}
        signals: Signals = {
            OURS: partial(os.kill, ours.pid),
            NOT_WARM: partial(os.kill, ours_too.pid),
        }
        file = model.path / model.points[point].graph
        for name, python in pythons.items():
            try:
                rivals[name] = stack.enter_context(rival(name, python, file, serving))
            except MissingError as error:
                missing[name] = str(error)
        addresses |= {name: started.address for name, started in rivals.items()}
        calls = {
            (name, form): Call(address + _path(point, name, form), *_body(model, name, form))
            for name, address in addresses.items()
            for form in FORMS
            if (name, form) in PATHS
        }
        signals |= {name: partial(os.killpg, started.group) for name, started in rivals.items()}
        bench = Bench(calls, chosen.seconds, chosen.share, serving, signals)
        rows = bench.compared(chosen.rounds)
    result = {
        **report.conditions(),
        "model": model.manifest.name,
        "point": point,
        "cores": {"sending": sorted(sending), "serving": sorted(serving)},
        "cores_used_by_others_and_us": elsewhere.share(),
        "seconds": chosen.seconds,
        "rounds": chosen.rounds,
        "poisson_share_of_floor": chosen.share,
        "servers": {name: started.version for name, started in rivals.items()},
        "missing": missing,
        "rows": rows,
    }
    report.write(result, report.place("overhead.json", chosen.out, quick=chosen.quick))
    Console(stderr=True, width=120).print(table(rows))


class Bench:
    """Servers that are up, and what they are sent."""

    def __init__(
        self,
        calls: Mapping[tuple[str, str], Call],
        seconds: float,
        share: float,
        serving: set[int],
        signals: Signals,
    ) -> None:
        self._signals = signals
        self._calls = calls
        self._seconds = seconds
        self._share = share
        self._serving = serving
        self._rates = {form: share * self._capacity(form) for form in FORMS}

    def compared(self, rounds: int) -> list[Row]:
        """Return a row per server, form and load; quantiles over all rounds, in ms."""
        found: dict[Cell, list[Run]] = {}
        todo = [(seed, cell) for seed in range(rounds) for cell in self._in_turn(seed)]
        for seed, cell in track(todo, "load", console=Console(stderr=True), transient=True):
            found.setdefault(cell, []).append(self._run(cell, seed))
        return [
            {
                **row(cell, found[cell]),
                **over_floor(found[cell], found[FLOOR, cell[1], cell[2]]),
                **(over_rivals(cell, found) if cell[0] == OURS else {}),
            }
            for cell in ((name, form, load) for name, form in self._calls for load in LOADS)
            if cell in found
        ]

    def _in_turn(self, seed: int) -> list[Cell]:
        """Return what a round takes: load by load, the servers of one load one after the other."""
        rng = random.Random(seed)
        loads = [(form, load) for form in FORMS for load in LOADS]
        return [
            (name, form, load)
            for form, load in rng.sample(loads, len(loads))
            for name, taken in rng.sample(list(self._calls), len(self._calls))
            if taken == form and (name != NOT_WARM or load == LONE)
        ]

    def _capacity(self, form: str) -> float:
        """Return how many requests a second the floor answers over many connections."""
        call = self._calls[FLOOR, form]
        asyncio.run(closed_loop(call, MANY, self._seconds / 2))
        latencies, seconds = asyncio.run(closed_loop(call, MANY, self._seconds))
        return len(latencies.ms) / seconds

    def _run(self, cell: Cell, seed: int) -> Run:
        """Return what came of one load, after a short one to warm up, and its seconds."""
        name, form, load = cell
        call = self._calls[name, form]
        settle(self._serving)
        connections = 1 if load in ("one", LONE) else MANY
        with stopped(send for other, send in self._signals.items() if other != name):
            asyncio.run(closed_loop(call, connections, self._seconds / 10))
            if load == LONE:
                after_pauses_s = [PAUSE_S * i for i in range(1, LONE_REQUESTS + 1)]
                return asyncio.run(open_loop(call, after_pauses_s))
            if load != "poisson":
                return asyncio.run(closed_loop(call, connections, self._seconds))
            rng = np.random.default_rng(seed)  # the same arrivals for every server
            count = max(1, round(self._rates[form] * self._seconds))
            arrivals_s = rng.exponential(1 / self._rates[form], count).cumsum()
            return asyncio.run(open_loop(call, arrivals_s.tolist()))


@contextmanager
def stopped(signals: Iterable[Callable[[int], object]]) -> Iterator[None]:
    """Let servers stand still inside: those that do something now and then take time of the one
    that is asked, or keep what all use in the caches."""
    given = list(signals)
    for send in given:
        send(signal.SIGSTOP)
    try:
        yield
    finally:
        for send in given:
            send(signal.SIGCONT)


def settle(cores: set[int]) -> None:
    """Wait until these cores are idle: a server that drowned computes on for those who gave up."""
    give_up_s = time.monotonic() + SETTLED_S
    while time.monotonic() < give_up_s:
        elsewhere = Elsewhere(cores)
        time.sleep(0.2)
        if elsewhere.share() < QUIET:
            return


def row(cell: Cell, runs: Sequence[Run]) -> Row:
    """Return the figures of one server, form and load; throughput is the median over rounds."""
    name, form, load = cell
    ms = [one for latencies, _ in runs for one in latencies.ms]
    p50, p95, p99 = np.quantile(ms, (0.5, 0.95, 0.99)).tolist() if ms else (None, None, None)
    return {
        "server": name,
        "form": form,
        "load": load,
        "n": len(ms),
        "failed": sum(latencies.failed for latencies, _ in runs),
        "per_s": median(map(_per_s, runs)),
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
    }


def over_floor(runs: Sequence[Run], floor: Sequence[Run]) -> dict[str, float | None]:
    """Return p50, p99 and throughput over those of the floor in the same rounds."""
    figures: dict[str, Figure] = {
        "p50_ms": partial(_quantile_ms, q=0.5),
        "p99_ms": partial(_quantile_ms, q=0.99),
        "per_s": _per_s,
    }
    return {f"{name}_over_floor": _over(of, runs, floor) for name, of in figures.items()}


def over_rivals(cell: Cell, found: Mapping[Cell, Sequence[Run]]) -> dict[str, Any]:
    """Return a cell's throughput over that of each other server in the same rounds."""
    _, form, load = cell
    others = [name for name in PROGRAMS if (name, form, load) in found]
    over = {name: _over(_per_s, found[cell], found[name, form, load]) for name in others}
    return {"per_s_over": over}


def _over(figure: Figure, ours: Sequence[Run], theirs: Sequence[Run]) -> float | None:
    """Return the median of the rounds' ratios, of rounds in which both answered."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a[0].ms and b[0].ms]
    return median(figure(a) / figure(b) for a, b in pairs) if pairs else None


def _quantile_ms(run: Run, q: float) -> float:
    return float(np.quantile(run[0].ms, q))


def _per_s(run: Run) -> float:
    latencies, seconds = run
    return len(latencies.ms) / seconds


def table(rows: Sequence[Row]) -> Table:
    """Return the figures for a terminal."""
    found = Table(title="milliseconds and answers a second; × is over the floor's")
    found.box = box.SIMPLE_HEAD
    heads = ("load", "form", "server", "p50", "×", "p95", "p99", "×", "per s", "×", "n", "failed")
    for head in heads:
        found.add_column(head, justify="right", no_wrap=True)
    for one in sorted(rows, key=lambda one: (LOADS.index(one["load"]), one["form"])):
        figures = ("p50_ms", "p50_ms_over_floor", "p95_ms", "p99_ms", "p99_ms_over_floor", "per_s")
        found.add_row(
            *(one[name] for name in ("load", "form", "server")),
            *("-" if one[name] is None else f"{one[name]:.2f}" for name in figures),
            "-" if one["per_s_over_floor"] is None else f"{one['per_s_over_floor']:.2f}",
            *(str(one[name]) for name in ("n", "failed")),
        )
    return found


def _lenet(folder: Path) -> Artifact:
    network = networks.lenet()
    return network.save(folder / "lenet.maestro", network.uniform_chain(7))


def _path(point: int, name: str, form: str) -> str:
    return PATHS[name, form] + (f"?point={point}" if name in (OURS, NOT_WARM) else "")


def _body(model: Artifact, name: str, form: str) -> tuple[str, bytes]:
    """Return the type and the bytes of one sample, the same numbers in every form."""
    tensor, sample = model.manifest.input, npy_sample(model)
    if form == "npy":
        return "application/x-npy", sample
    x = np.load(io.BytesIO(sample))
    content: dict[str, Any] = {"inputs": x}
    if name == "mlserver":
        flat = x.reshape(-1)
        entry = {"name": tensor.name, "datatype": "FP32", "shape": x.shape, "data": flat}
        content = {"inputs": [entry]}
    return "application/json", orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def _pythons(given: Sequence[str]) -> dict[str, str]:
    found = dict(one.partition("=")[::2] for one in given)
    for name, python in found.items():
        if name not in PROGRAMS or not python:
            raise ValueError(f"--rival {name}={python}: give NAME=PYTHON, of {', '.join(PROGRAMS)}")
    return found


if __name__ == "__main__":
    main()
