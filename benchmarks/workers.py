"""`maestro bench workers`: several processes on one port against one that has all the cores.

Both servers are up all along, and rounds of load go to them in random order. The sender runs on the
same cores, so the network has to be large beside what it costs to ask. Memory is then that of each
server up alone, after load: the proportional set size of all its processes, where a page that k of
them map counts once. Beside it stands that of as many processes that have imported the server and
load no model.
"""

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import arguments, networks, report
from benchmarks.http_load import Call, closed_loop
from benchmarks.memory import mapped_mib
from benchmarks.own_server import npy_sample, serving
from maestro_core import artifact
from maestro_core.artifact import Artifact
from maestro_core.host import Elsewhere, affinity

POINTS = 16
STRIDE = 4


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the result, and write it where `--out` says."""
    cores = set(affinity())
    parser = argparse.ArgumentParser(prog="maestro bench workers", description=__doc__)
    parser.add_argument(
        "artifact", type=Path, nargs="?", help="ResNet-18 of random weights if none"
    )
    parser.add_argument("--workers", type=int, default=len(cores))
    parser.add_argument("--connections", type=arguments.count, default=8)
    parser.add_argument(
        "--seconds", type=arguments.positive, default=5.0, help="of load in each round"
    )
    parser.add_argument("--rounds", type=arguments.count, default=5)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "workers.json")
    chosen = parser.parse_args(argv)
    if not 2 <= chosen.workers <= len(cores):
        raise ValueError(f"--workers must be in 2..{len(cores)}, the cores of this host")
    elsewhere = Elsewhere()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = artifact.load(chosen.artifact) if chosen.artifact else _resnet(Path(folder))
        started = {
            number: stack.enter_context(serving(model, Path(folder), cores, workers=number))
            for number in (1, chosen.workers)
        }
        calls = {number: call(model, address) for number, (address, _) in started.items()}
        per_s = throughput(calls, chosen.connections, chosen.seconds, chosen.rounds)
        stack.close()
        mib: dict[int, dict[str, float]] = {}
        for number in started:
            with serving(model, Path(folder), cores, workers=number) as (address, pid):
                throughput({number: call(model, address)}, chosen.connections, 1.0, 1)
                mib[number] = tree_mib(pid)
        imported = imported_mib(chosen.workers)
    one, several = per_s[1], per_s[chosen.workers]
    result: dict[str, Any] = {
        **report.conditions(),
        "model": model.manifest.name,
        "points": len(model.points),
        "workers": chosen.workers,
        "connections": chosen.connections,
        "seconds": chosen.seconds,
        "rounds": chosen.rounds,
        "cores_used_by_others_and_us": elsewhere.share(),
        "memory_mib": {str(number): found for number, found in mib.items()},
        "imported_mib": imported,
        "memory_over_one": round(mib[chosen.workers]["pss"] / mib[1]["pss"], 3),
        "memory_over_one_and_imported": round(
            mib[chosen.workers]["pss"] / (mib[1]["pss"] + imported), 3
        ),
        "per_s": {"1": median(one), str(chosen.workers): median(several)},
        "per_s_over_one": round(median(b / a for a, b in zip(one, several, strict=True)), 3),
    }
    report.write(result, chosen.out)


def call(model: Artifact, address: str) -> Call:
    """Return the call that asks for one sample at the last point."""
    url = f"{address}/infer?point={len(model.points) - 1}"
    return Call(url, "application/x-npy", npy_sample(model))


def throughput(
    calls: dict[int, Call], connections: int, seconds: float, rounds: int
) -> dict[int, list[float]]:
    """Return answers a second of each server in each round."""
    rng = random.Random(0)
    found: dict[int, list[float]] = {number: [] for number in calls}
    for round_ in range(rounds + 1):
        for number in rng.sample(sorted(calls), len(calls)):
            latencies, took_s = asyncio.run(closed_loop(calls[number], connections, seconds))
            if round_:  # the first warms up
                found[number].append(len(latencies.ms) / took_s)
    return found


def tree_mib(pid: int) -> dict[str, float]:
    """Return the memory of a process and of its children, in MiB: proportional, and private."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    found = [mapped_mib(one) for one in pids]
    return {name: round(sum(one[name] for one in found), 1) for name in ("pss", "private")}


def imported_mib(processes: int) -> float:
    """Return the memory of so many processes that have imported the server, and wait, in MiB."""
    program = "import sys, server.running; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-P", "-c", program]
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603
            )
            for _ in range(processes)
        ]
        for process in started:
            process.stdout.readline()  # type: ignore[union-attr]  # it is a pipe
        return round(sum(mapped_mib(process.pid)["pss"] for process in started), 1)


def _resnet(folder: Path) -> Artifact:
    network = networks.resnet18()
    chain = network.staggered_chain(POINTS, STRIDE)
    return network.save(folder / f"{network.name}.maestro", chain)


if __name__ == "__main__":
    main()
