"""`maestro bench search`: points found by this host's milliseconds against other ways to find them.

By MACs (the artifact's own points), one share of the rank for every layer, and one share of the
energy of its singular values. Points of all ways run in interleaved random order.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from benchmarks import arguments, host_artifact, host_points, report
from benchmarks.host_points import Candidate, Network, Ranks
from benchmarks.layer_latencies import Measuring
from maestro_core import artifact
from maestro_core.artifact import Layer
from maestro_core.host import Elsewhere

SHARES = 16
GAIN = 0.9  # at equal accuracy, somewhere: a tenth faster


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the result, and write it where `--out` says."""
    parser = argparse.ArgumentParser(prog="maestro bench search", description=__doc__)
    parser.add_argument("artifact", type=Path, help="one with eval.npz and errors.json")
    parser.add_argument(
        "--budget-s", type=arguments.positive, default=60.0, help="of measuring, for each half"
    )
    parser.add_argument("--threads", type=arguments.count, default=1)
    parser.add_argument("--plot", type=Path, help="draw the ways into this PNG")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "search.json")
    chosen = parser.parse_args(argv)
    network = Network.of(artifact.load(chosen.artifact))
    measuring = Measuring(chosen.budget_s, chosen.threads)
    elsewhere = Elsewhere()
    ways, correction = compared(network, measuring)
    floor = ways["by_macs"][0].correct  # what the search was told to stay above
    result = {
        **report.conditions(),
        "artifact": network.artifact.manifest.name,
        "samples": len(network.samples),
        "intra_op_threads": chosen.threads,
        "batch": measuring.batch,
        "cores_used_by_others": elsewhere.share(),
        "layers_to_whole": correction,
        "searched_against": {
            way: against(ways["searched"], points, floor)
            for way, points in ways.items()
            if way != "searched"
        },
        "ways": {way: [_row(point) for point in points] for way, points in ways.items()},
    }
    report.write(result, chosen.out)
    if chosen.plot:
        _draw(result["ways"], chosen.plot)


def compared(
    network: Network, measuring: Measuring
) -> tuple[dict[str, list[Candidate]], dict[str, float]]:
    """Return the verified points of each way, and how well layers alone predicted whole points."""
    found = host_points.search(network, host_artifact.POINTS, measuring)
    ranks = {
        "by_macs": [point.ranks for point in network.artifact.points],
        "uniform": uniform_chain(network.artifact.manifest.layers),
        "energy": energy_chain(network),
    }
    network = replace(network, dense_when_whole=found.dense_when_whole)
    plans = {
        "searched": [candidate.plan for candidate in found.points],
        **{way: [network.plan(r) for r in chain] for way, chain in ranks.items()},
    }
    every = list(dict.fromkeys(plan for chain in plans.values() for plan in chain))
    known = dict(zip(every, host_points.verified(network, every, measuring), strict=True))
    ways = {way: [known[plan] for plan in chain] for way, chain in plans.items()}
    return ways, asdict(found.correction)


def against(ours: Sequence[Candidate], theirs: Sequence[Candidate], floor: int) -> dict[str, Any]:
    """Return where our points lie below theirs, and our latency over theirs at their accuracies.

    Of theirs only those count that get at least `floor` samples right: ours are no less accurate.
    Below by more than the interval: none of ours that is as fast is as accurate as the lower end
    of the 95 % interval of theirs.
    """
    below, ratios = [], []
    counted = [other for other in theirs if other.correct >= floor]
    for other in counted:
        as_fast = [point.score.value for point in ours if point.p50_ms <= other.p50_ms]
        if max(as_fast, default=0.0) < other.score.low:
            below.append({"ranks": other.ranks, "p50_ms": round(other.p50_ms, 4)})
        as_good = [point.p50_ms for point in ours if point.correct >= other.correct]
        if as_good:
            ratios.append(min(as_good) / other.p50_ms)
    return {
        "points": len(theirs),
        "points_above_the_floor": len(counted),
        "below_by_more_than_the_interval": below,
        "least_latency_ratio_at_equal_accuracy": round(min(ratios), 3) if ratios else None,
        "median_latency_ratio": round(float(np.median(ratios)), 3) if ratios else None,
        "a_tenth_faster_somewhere": any(ratio <= GAIN for ratio in ratios),
    }


def uniform_chain(layers: Sequence[Layer]) -> list[Ranks]:
    """Return points in which every layer has the same share of its ranks."""
    return _chain(layers, lambda layer, share: max(1, round(share * layer.max_rank)))


def energy_chain(network: Network) -> list[Ranks]:
    """Return points in which every layer keeps the same share of its singular values' energy."""
    kept = {
        name: np.cumsum(values**2) / np.sum(values**2)
        for name, values in singular_values(network).items()
    }
    return _chain(
        network.artifact.manifest.layers,
        lambda layer, share: int(np.searchsorted(kept[layer.name], share - 1e-9)) + 1,
    )


def _chain(layers: Sequence[Layer], rank: Callable[[Layer, float], int]) -> list[Ranks]:
    chain: dict[Ranks, None] = {}
    for i in range(SHARES):
        ranks = (min(layer.max_rank, rank(layer, (i + 1) / SHARES)) for layer in layers)
        chain[
            tuple(
                layer.max_rank if layer.is_dense(r) else r
                for layer, r in zip(layers, ranks, strict=True)
            )
        ] = None
    return list(chain)


def singular_values(network: Network) -> dict[str, NDArray[np.float64]]:
    """Return those of each layer's product of factors, falling."""
    folder = str(network.folder)
    tensors = {
        tensor.name: tensor
        for tensor in network.template.graph.initializer
        if tensor.name.endswith((".down", ".up"))
    }

    def triangle(name: str) -> NDArray[np.float64]:
        factor = numpy_helper.to_array(tensors[name], folder).astype(np.float64)
        return np.asarray(np.linalg.qr(factor.reshape(len(factor), -1).T).R)

    return {
        layer.name: np.asarray(
            np.linalg.svd(
                triangle(f"{layer.name}.up") @ triangle(f"{layer.name}.down").T, compute_uv=False
            )
        )
        for layer in network.layers
    }


def _row(point: Candidate) -> dict[str, Any]:
    score = point.score
    return {
        "ranks": point.ranks,
        "p50_ms": round(point.p50_ms, 4),
        "accuracy": round(score.value, 4),
        "interval": [round(score.low, 4), round(score.high, 4)],
    }


def _draw(ways: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw accuracy by latency, a line for each way."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for way, points in ways.items():
        rows = sorted(points, key=lambda row: row["p50_ms"])
        x, y = [row["p50_ms"] for row in rows], [100 * row["accuracy"] for row in rows]
        axes.plot(x, y, marker="o", markersize=3, linewidth=1, label=way.replace("_", " "))
    axes.set(xlabel="measured latency, ms (p50)", ylabel="accuracy, %")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
