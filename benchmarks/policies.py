"""`maestro bench policies`: our policy and its rivals on the same simulated requests.

Latencies are drawn from a real profile with its spread: of ARTIFACT on this host, or of ResNet-18.
"""

import argparse
import math
import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import networks, policies_plot, profiler, report
from benchmarks.effort import FULL
from benchmarks.simulator import reach, scenarios, workloads
from benchmarks.simulator.figures import Figures, figures, over_seeds
from benchmarks.simulator.host import Quantiles
from benchmarks.simulator.scenarios import ARRIVALS, BURSTY, Scenario
from maestro_core import artifact
from maestro_core.artifact import Artifact
from maestro_core.host import usable_cores
from maestro_core.profile import Profile
from server.engine import Engine
from server.selector import choose
from server.tables import Tables

LOADS = (0.3, 0.6, 1.0, 1.5, 2.0, 3.0)
MAX_BATCH = 16
# Scores of networks with random weights: from here to there, as the OFA-ResNets of SuperServe
# (NSDI 2025, on ImageNet), in the logarithm of the median.
MADE_UP = (0.73, 0.80)
WAITING = (16, 64, 256, 1024)
OURS = ("ours", "reserve")
# Ours, but no batch is interrupted: what that is worth. Compared with rivals, and no rival itself.
UNPREEMPTED = " unpreempted"

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, print the result, write it and its plot where `--out` says."""
    parser = argparse.ArgumentParser(prog="maestro bench policies", description=__doc__)
    parser.add_argument(
        "artifact", type=Path, nargs="?", help="ResNet-18 of random weights if none"
    )
    parser.add_argument("--profile", type=Path, help="a profile.json, not measured again")
    parser.add_argument("--trace", type=Path, help="arrivals to replay, a time in seconds a line")
    parser.add_argument("--requests", type=int, default=5000, help="of each run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--request-ms",
        type=float,
        default=0.0,
        help="what receiving and answering a request take of the core (`maestro bench load` "
        "measures it); 0 counts the engine alone",
    )
    parser.add_argument("--steady", type=int, default=1_000_000, help="requests of the long run")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "policies.json")
    chosen = parser.parse_args(argv)
    if chosen.requests < 100 or chosen.seeds < 1 or chosen.steady < 100:
        raise ValueError("--requests and --steady must be at least 100, --seeds at least 1")
    if not 0 <= chosen.request_ms < math.inf:
        raise ValueError(f"--request-ms is {chosen.request_ms}, not 0 or more")
    if chosen.trace:
        workloads.replay(chosen.trace, 1.0, 1, np.random.default_rng(0))  # refused before the work
    quantiles, source = read_quantiles(chosen.artifact, chosen.profile)
    seeds, request_ms = range(chosen.seeds), chosen.request_ms
    rows = compared(quantiles, chosen.requests, seeds, chosen.trace, request_ms)
    result = {
        **report.conditions(),
        "source": source,
        "requests": chosen.requests,
        "seeds": chosen.seeds,
        "request_ms": request_ms,
        "target_ms": scenarios.TARGET * quantiles.p50_ms[-1][0] + quantiles.overhead_ms,
        "largest_point_rps": 1e3 / Tables(quantiles.latencies()).unit_ms[-1],
        "reached": {
            "against_rivals": against_rivals(rows, "ours"),
            "reserve_against_rivals": against_rivals(rows, "reserve"),
            "unpreempted_against_rivals": against_rivals(rows, "ours" + UNPREEMPTED),
            "reserve_unpreempted_against_rivals": against_rivals(rows, "reserve" + UNPREEMPTED),
            "bursts": bursts(rows, "ours"),
            "reserve_bursts": bursts(rows, "reserve"),
            **special_runs(quantiles, chosen.requests, seeds, chosen.steady, request_ms),
        },
        "rows": rows,
        "quantiles": asdict(quantiles),
    }
    report.write(result, chosen.out)
    policies_plot.draw(rows, chosen.out.with_suffix(".png"))


def read_quantiles(path: Path | None, profile_path: Path | None) -> tuple[Quantiles, str]:
    """Return what the host draws from, and where it comes from.

    Raises:
        ValueError: the profile is none, or of another artifact.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = artifact.load(path) if path else _resnet(Path(folder))
        if profile_path:
            profile = Profile.from_json(profile_path.read_text(encoding="utf-8"))
            if profile.key.artifact != model.digest:
                raise ValueError(f"{profile_path}: a profile of another artifact than {model.path}")
        else:
            engine = Engine(model, intra_op_threads=usable_cores(), state_dir=Path(folder))
            sizes = profiler.batch_sizes_to(MAX_BATCH)
            profile = profiler.profile(engine, FULL, batch_sizes=sizes)
    manifest, host = model.manifest, profile.key.host
    if manifest.metric.samples:
        accuracy = [point.score.value for point in manifest.points]
        scores = f"{manifest.metric.name} on {manifest.metric.data_set}"
    else:
        accuracy = made_up([profile.row(point)[0].p50_ms for point in profile.points])
        scores = "made up"
    what = f"{manifest.name} on {host.cpu}, {host.cores} cores, profiled {profile.measured_at}"
    return Quantiles.from_profile(profile, accuracy), f"{what}; accuracy {scores}"


def _resnet(folder: Path) -> Artifact:
    network = networks.resnet18()
    return network.save(folder / f"{network.name}.maestro", network.uniform_chain(16))


def made_up(p50_ms: Sequence[float]) -> list[float]:
    """Return accuracies for points that have none, rising with the logarithm of their latency."""
    low, high = MADE_UP
    first, last = math.log(min(p50_ms)), math.log(max(p50_ms))
    return [low + (high - low) * (math.log(ms) - first) / (last - first) for ms in p50_ms]


def compared(
    quantiles: Quantiles,
    requests: int,
    seeds: Sequence[int],
    trace: Path | None,
    request_ms: float = 0.0,
) -> list[Row]:
    """Return a row per scenario and policy: the figures with their intervals over the seeds.

    `met_by_seed` is for differences: policies have the same requests at one seed.
    """
    names = [name for name in ARRIVALS if name != "trace" or trace]
    todo = [Scenario(*case) for case in product(names, LOADS, (False, True))]
    one = partial(_one_seed, quantiles, requests, trace, request_ms)
    found = _in_parallel(one, list(product(todo, seeds)), "policies")
    return [
        {
            "arrivals": scenario.arrivals,
            "targets": "mixed" if scenario.mixed else "one",
            "load": scenario.load,
            "policy": policy,
            **over_seeds([found[scenario, seed][policy] for seed in seeds]),
            "met_by_seed": [found[scenario, seed][policy]["met"] for seed in seeds],
        }
        for scenario in todo
        for policy in found[scenario, seeds[0]]
    ]


def _one_seed(
    quantiles: Quantiles,
    requests: int,
    trace: Path | None,
    request_ms: float,
    case: tuple[Scenario, int],
) -> dict[str, Figures]:
    """Return each policy's figures on the same requests."""
    scenario, seed = case
    latencies = quantiles.latencies()
    tables = Tables(latencies)
    workload = scenario.workload(latencies, requests, seed, trace)
    tried = scenarios.policies(tables, scenario.rate(tables)) | scenarios.slack_fits(tables)
    tried |= {name + UNPREEMPTED: tried[name] for name in OURS}
    return {
        name: figures(
            scenarios.run(
                quantiles,
                workload,
                policy,
                seed,
                request_ms=request_ms,
                preempts=not name.endswith(UNPREEMPTED),
                clock=perf_counter if policy is choose else None,
            ),
            latencies,
        )
        for name, policy in tried.items()
    }


def _in_parallel(work: Callable[[Any], Any], cases: Sequence[Any], what: str) -> dict[Any, Any]:
    """Return what the work gives for each case, done in as many processes as there are cores.

    They are spawned: a forked one has the sessions of an engine that measured a profile but not
    their threads, and waits for these for ever when it frees one. An interrupt is this process's,
    which then begins no more cases.
    """
    spawned = multiprocessing.get_context("spawn")
    ignored = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(usable_cores(), spawned, signal.signal, ignored) as pool:
        futures = {pool.submit(work, case): case for case in cases}
        done: Iterable[Any] = as_completed(futures)
        bar = track(done, what, len(futures), console=Console(stderr=True), transient=True)
        try:
            return {futures[future]: future.result() for future in bar}
        finally:
            pool.shutdown(cancel_futures=True)


def special_runs(
    quantiles: Quantiles, requests: int, seeds: Sequence[int], long: int, request_ms: float
) -> dict[str, Any]:
    """Return the runs of `simulator.reach`, each with its interval over the seeds.

    The best schedule, and ours beside it, have nothing but the engine.
    """
    host = reach.Served(quantiles, request_ms)
    small_seeds = range(4 * len(seeds))
    return {
        "near_bound": [
            {
                "cv2": cv2,
                "load": load,
                **over_seeds([reach.near_bound(quantiles, cv2, load, s) for s in small_seeds]),
            }
            for cv2, load in product((1.0, 4.0), (0.5, 1.0, 2.0, 3.0))
        ],
        "slowed": [
            {
                "arrivals": name,
                "load": load,
                **over_seeds(
                    [reach.slowed(host, Scenario(name, load), requests, s) for s in seeds]
                ),
            }
            for name, load in product(("poisson", "gamma2"), (0.6, 1.0))
        ],
        "overloaded": [
            {
                "cv2": cv2,
                **over_seeds([reach.overloaded(host, cv2, requests, s) for s in seeds]),
            }
            for cv2 in (1.0, 4.0)
        ],
        "steady": reach.steady(host, long, perf_counter),
        "decisions": [
            reach.decision_us(64, waiting, requests, perf_counter, loose)
            for waiting, loose in product(WAITING, (reach.LOOSE, reach.TIGHT))
        ],
    }


def against_rivals(rows: Sequence[Row], name: str) -> list[Row]:
    """Return for each scenario how one of ours stands, in shares.

    met_margin: over the targets met of the rival that meets the most, seed by seed, and half of the
    95 % interval. accuracy_margin: over SlackFit's accuracy,
    with the part of its slack that gives the most among those that meet as many targets as
    ours (to 0.1 point); None where none does. misses: ours over those of SlackFit as published.
    """
    verdicts = []
    for key in dict.fromkeys(_scenario(row) for row in rows):
        own = {row["policy"]: row for row in rows if _scenario(row) == key}
        ours, published = own[name], own["slackfit"]
        others = [row for other, row in own.items() if other not in OURS and " " not in other]
        fits = [row for other, row in own.items() if other.startswith("slackfit")]
        equal = [
            row["accuracy"][0]
            for row in fits
            if row["accuracy"] and row["met"][0] >= ours["met"][0] - 1e-3
        ]
        best = max(others, key=lambda row: float(row["met"][0]))
        missed = 1 - published["met"][0]
        verdicts.append(
            {
                "arrivals": key[0],
                "targets": key[1],
                "load": key[2],
                "met": ours["met"][0],
                "accuracy": ours["accuracy"] and ours["accuracy"][0],
                "met_margin": _margin(ours, best),
                "best_rival": best["policy"],
                "accuracy_margin": ours["accuracy"][0] - max(equal) if equal else None,
                "misses": (1 - ours["met"][0]) / missed if missed else None,
            }
        )
    return verdicts


def _margin(ours: Row, theirs: Row) -> tuple[float, float]:
    pairs = zip(ours["met_by_seed"], theirs["met_by_seed"], strict=True)
    (margin,) = over_seeds([{"met": a - b} for a, b in pairs]).values()
    assert margin is not None  # noqa: S101  shares are finite
    return margin


def bursts(rows: Sequence[Row], name: str) -> list[Row]:
    """Return the share of feasible targets that one of ours meets, where the load is bursty and the
    largest point alone meets less than 0.6."""
    share = {(*_scenario(row), row["policy"]): row["met_feasible"] for row in rows}
    return [
        {
            "arrivals": arrivals,
            "targets": targets,
            "load": load,
            "largest": share[arrivals, targets, load, "largest"][0],
            "ours": share[arrivals, targets, load, name],
        }
        for arrivals, targets, load in dict.fromkeys(_scenario(row) for row in rows)
        if arrivals in BURSTY and share[arrivals, targets, load, "largest"][0] < 0.6
    ]


def _scenario(row: Row) -> tuple[str, str, float]:
    return row["arrivals"], row["targets"], row["load"]


if __name__ == "__main__":
    main()
