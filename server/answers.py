"""From an output to the answer that a client reads. Pure."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestro_core.artifact import Artifact
from maestro_core.frontier import pareto
from maestro_core.profile import Profile
from server.errors import InvalidError
from server.inputs import is_finite
from server.schemas import InferParameters


@dataclass(slots=True)
class Inference:
    """What came of one request: its output (n, …) and how it was run."""

    output: NDArray[np.float32]
    point: int
    predicted_ms: float
    queue_ms: float
    compute_ms: float
    batch_size: int


def infer_answer(
    artifact: Artifact, parameters: InferParameters, inference: Inference, total_s: float
) -> dict[str, Any]:
    """Return the body of the answer, as schemas.InferAnswer describes it.

    Raises:
        InvalidError: the output holds NaN or infinite values, which JSON has no words for.
    """
    if not is_finite(inference.output):
        raise InvalidError("the output is not finite: the input is too large for this network")
    manifest = artifact.manifest
    point = artifact.points[inference.point]
    total_ms = _rounded_ms(1e3 * total_s)
    target_ms = parameters.max_latency_ms
    labels, output = manifest.labels, inference.output
    top = (
        top_classes(labels, output, parameters.top_k)
        if parameters.top_k and output.ndim == 2
        else None
    )
    return {
        "model": manifest.name,
        "labels": labels and [labels[i] for i in output.argmax(-1).tolist()],
        "top": top,
        "point": inference.point,
        "ranks": artifact.ranks[inference.point],
        "accuracy": point.score.value,
        "predicted_ms": _rounded_ms(inference.predicted_ms),
        "queue_ms": _rounded_ms(inference.queue_ms),
        "compute_ms": _rounded_ms(inference.compute_ms),
        "total_ms": total_ms,
        "max_latency_ms": target_ms,
        "target_met": None if target_ms is None else total_ms <= target_ms,
        "batch_size": inference.batch_size,
        "outputs": output,
    }


def _rounded_ms(ms: float) -> float:
    """Return a time to the microsecond. `round` would look for the nearest decimal, and longer."""
    return int(1e3 * ms + 0.5) / 1e3


def frontier_rows(
    artifact: Artifact, profile: Profile | None, batch: int = 1
) -> list[dict[str, Any]]:
    """Return the points, cheapest first, with a host's latencies where there is a profile.

    Raises:
        ProfileError: the batch size was not profiled.
    """
    rows: list[dict[str, Any]] = []
    for i, point in enumerate(artifact.points):
        latencies = dict.fromkeys(("p50_ms", "p50_low_ms", "p50_high_ms", "p95_ms", "p99_ms"))
        if profile is not None:
            p50_ms, p95_ms, p99_ms = (profile.quantile_ms(i, batch, q) for q in (50, 95, 99))
            found = (p50_ms, *profile.median_interval_ms(i, batch), p95_ms, p99_ms)
            latencies = {name: round(ms, 4) for name, ms in zip(latencies, found, strict=True)}
        rows.append(
            {
                "point": i,
                "ranks": artifact.ranks[i],
                "accuracy": point.score.value,
                "accuracy_low": point.score.low,
                "accuracy_high": point.score.high,
                "macs": point.macs,
                "params": point.params,
                **latencies,
                "on_frontier": None,
            }
        )
    if profile is not None:
        front = pareto([row["p50_ms"] for row in rows], [row["accuracy"] for row in rows])
        for i, row in enumerate(rows):
            row["on_frontier"] = i in front
    return rows


def top_classes(
    labels: tuple[str, ...] | None, output: NDArray[np.float32], k: int
) -> list[list[dict[str, Any]]]:
    """Return the k most likely classes of each sample, with their softmax."""
    shifted = np.exp(output - output.max(-1, keepdims=True))
    shares = shifted / shifted.sum(-1, keepdims=True)
    order = np.argsort(-output, -1, kind="stable")[:, :k]
    return [
        [
            {
                "label": labels[i] if labels else str(i),
                "index": int(i),
                "score": round(float(row[i]), 6),
            }
            for i in best
        ]
        for row, best in zip(shares, order, strict=True)
    ]
