"""From an output to the answer that a client reads. Pure."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestro_core.artifact import Artifact
from server.schemas import InferParameters


@dataclass(frozen=True, slots=True)
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
    """Return the body of the answer, as schemas.InferAnswer describes it."""
    manifest = artifact.manifest
    point = artifact.points[inference.point]
    total_ms = 1e3 * total_s
    target_ms = parameters.max_latency_ms
    labels, output = manifest.labels, inference.output
    top = _top(labels, output, parameters.top_k) if parameters.top_k and output.ndim == 2 else None
    return {
        "model": manifest.name,
        "labels": labels and [labels[i] for i in output.argmax(-1)],
        "top": top,
        "point": inference.point,
        "ranks": {layer.name: r for layer, r in zip(manifest.layers, point.ranks, strict=True)},
        "accuracy": point.score.value,
        "predicted_ms": round(inference.predicted_ms, 3),
        "queue_ms": round(inference.queue_ms, 3),
        "compute_ms": round(inference.compute_ms, 3),
        "total_ms": round(total_ms, 3),
        "max_latency_ms": target_ms,
        "target_met": None if target_ms is None else total_ms <= target_ms,
        "batch_size": inference.batch_size,
        "outputs": output,
    }


def _top(
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
