"""`maestro bench slots`: one batch on all cores, or several batches at once on fewer cores each.

Every split of the cores runs without pause for a while, in turns and random order: samples per
second, and how long a batch takes. The server computes one batch at a time.
"""

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arguments, networks, report
from benchmarks.profiler import batch_sizes_to
from maestro_core.artifact import Artifact
from maestro_core.host import Elsewhere, usable_cores
from server.engine import Engine

POINTS = 4
BATCHES = (1, 8)


@dataclass(slots=True)
class Split:
    """So many batches at once on so many cores each, and how long their runs took."""

    slots: int
    threads: int
    times_ms: list[float] = field(default_factory=list)
    elapsed_s: float = 0.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the result, and write it where `--out` says."""
    parser = argparse.ArgumentParser(prog="maestro bench slots", description=__doc__)
    parser.add_argument(
        "--seconds", type=arguments.positive, default=5.0, help="of each split at each batch"
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS / "slots.json")
    chosen = parser.parse_args(argv)
    cores = usable_cores()
    result: dict[str, Any] = {**report.conditions(), "cores": cores}
    with tempfile.TemporaryDirectory() as folder:
        for network in (networks.resnet18(), networks.encoder()):
            path = Path(folder) / f"{network.name}.maestro"
            model = network.save(path, network.uniform_chain(POINTS))
            elsewhere = Elsewhere()
            rows = compared(model, Path(folder), cores, chosen.seconds)
            result[network.name] = {"cores_used_by_others": elsewhere.share(), "rows": rows}
    report.write(result, chosen.out)


def compared(
    model: Artifact, state_dir: Path, cores: int, seconds: float, rounds: int = 5
) -> list[dict[str, Any]]:
    """Return what each split of the cores does, at the cheapest and dearest point and each batch.

    `seconds` of running for each, in so many rounds.
    """
    engines = {
        threads: Engine(model, intra_op_threads=threads, state_dir=state_dir)
        for threads in batch_sizes_to(cores)
    }
    x = np.ones((max(BATCHES), *model.manifest.input.shape[1:]), np.float32)
    rng = random.Random(0)
    rows = []
    for point in (0, len(model.points) - 1):
        for batch in BATCHES:
            splits = [Split(cores // threads, threads) for threads in engines]
            for _ in range(rounds):
                for split in rng.sample(splits, len(splits)):
                    run = partial(engines[split.threads].run, x[:batch], point)
                    _run(split, run, seconds / rounds)
            rows += [_row(split, point, batch) for split in splits]
    return rows


def _run(split: Split, run: Callable[[], object], seconds: float) -> None:
    """Run on so many threads as there are slots, after a run of each to warm up."""
    times_ms: list[list[float]] = [[] for _ in range(split.slots)]
    together = threading.Barrier(split.slots + 1)

    def work(own_ms: list[float]) -> None:
        run()
        together.wait()
        end_s = time.perf_counter() + seconds
        while (began_s := time.perf_counter()) < end_s:
            run()
            own_ms.append(1e3 * (time.perf_counter() - began_s))

    workers = [threading.Thread(target=work, args=(own,)) for own in times_ms]
    for worker in workers:
        worker.start()
    together.wait()
    began_s = time.perf_counter()
    for worker in workers:
        worker.join()
    split.elapsed_s += time.perf_counter() - began_s
    split.times_ms += [ms for own in times_ms for ms in own]


def _row(split: Split, point: int, batch: int) -> dict[str, Any]:
    p50, p95 = np.percentile(split.times_ms, (50, 95)).round(4).tolist()
    return {
        "point": point,
        "batch": batch,
        "slots": split.slots,
        "threads": split.threads,
        "samples_per_s": round(batch * len(split.times_ms) / split.elapsed_s, 1),
        "p50_ms": p50,
        "p95_ms": p95,
        "n": len(split.times_ms),
    }


if __name__ == "__main__":
    main()
