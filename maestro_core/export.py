"""From a trained network and its points to the artifact, checked against torch before it is saved.

Test pictures are used here and nowhere else: they score the points.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, nn

from maestro_core import artifact, graph
from maestro_core.accounting import Cost
from maestro_core.artifact import Artifact, Manifest, Metric, OperatingPoint, Score
from maestro_core.artifact import Tensor as TensorSpec
from maestro_core.data import Pictures
from maestro_core.evaluation import evaluate
from maestro_core.exportable import check_embeddings, check_outputs
from maestro_core.factorize import forward_at
from maestro_core.normalisation import evaluating
from maestro_core.search import Point, by_name
from maestro_core.template import INPUT, OUTPUT, ExportError, loaded, make_template

TOLERANCE = 1e-4
ROUNDINGS = 4  # times what 32-bit floats do to torch's own outputs: two runtimes round in two ways
CHECKED = 64  # pictures on which a point is compared with torch


@dataclass(frozen=True, slots=True)
class Description:
    """What the manifest says of the artifact beyond its network and points.

    `scored_on` is the data set and which part of it: "MNIST test".
    """

    name: str
    task: str
    labels: tuple[str, ...]
    scored_on: str
    provenance: dict[str, Any]


def export(
    model: nn.Module,
    cost: Cost,
    trained: Sequence[Point],
    test: Pictures,
    description: Description,
    path: Path,
    on_point: Callable[[], None],
    extras: Mapping[str, bytes] = MappingProxyType({}),
) -> Artifact:
    """Score every point, one rank per layer of `cost`, and write the artifact at `path`.

    `extras` are further files, path -> bytes (`held_out`).

    Raises:
        ExportError: a point's ONNX output differs from torch's by more than 1e-4 of the largest,
            and by more than rounding explains; there is not one output for each label; or an
            embedding is in two factors.
        ArtifactError: something is at `path` that is no artifact, or the disk does not take it;
            what was there is untouched.
    """
    artifact.check_replaceable(path)
    check_embeddings(model, keep=("*",))
    model.eval()
    x = test.batch(slice(0, CHECKED))[0].cpu()
    reference = copy.deepcopy(model).cpu()  # a GPU rounds in its own way, to 10 bits by default
    check_outputs(reference, x, len(description.labels))
    template, shared = graph.pack(make_template(reference, x), cost.layers)
    weights = bytearray(shared)
    private = [graph.place_(weights, _normalisation(template, point)) for point in trained]
    contents = {
        **extras,
        artifact.WEIGHTS: bytes(weights),
        artifact.TEMPLATE: template.SerializeToString(),
    }
    points = []
    for i, (point, own) in enumerate(zip(trained, private, strict=True)):
        name = f"points/{i:02}.onnx"
        contents[name] = graph.build(template, cost.layers, point.ranks, own).SerializeToString()
        named = by_name(cost, point.ranks)
        statistics = {name: value.cpu() for name, value in point.statistics.items()}
        _check_point(
            contents[name], contents[artifact.WEIGHTS], reference, named, statistics, x, name
        )
        result = evaluate(model, test, named, point.statistics)
        points.append(
            OperatingPoint(
                ranks=point.ranks,
                precision="fp32",
                score=Score.of_share(result.correct, result.n),
                macs=cost.macs_at(point.ranks),
                params=cost.params_at(point.ranks),
                graph=name,
            )
        )
        on_point()
    shape = (-1, *x.shape[1:])
    return artifact.save(path, _manifest(description, cost, points, test, shape), contents)


def _manifest(
    description: Description,
    cost: Cost,
    points: Sequence[OperatingPoint],
    test: Pictures,
    shape: tuple[int, ...],
) -> Manifest:
    """Return what the artifact says of itself; `shape` is of its input."""
    return Manifest(
        format=artifact.FORMAT,
        name=description.name,
        version="1",
        task=description.task,
        input=TensorSpec(INPUT, "float32", shape, test.image),
        output=TensorSpec(OUTPUT, "float32", (-1, len(description.labels))),
        labels=description.labels,
        metric=Metric("top-1 accuracy", description.scored_on, len(test), higher_is_better=True),
        dense_macs=cost.dense_macs,
        dense_params=cost.dense_params,
        layers=cost.layers,
        points=tuple(points),
        files={},
        provenance=description.provenance,
    )


def _normalisation(template: ModelProto, point: Point) -> dict[str, np.ndarray]:
    """Return the statistics of the point that its graph reads, by initializer."""
    read = {tensor.name for tensor in template.graph.initializer}
    return {name: value.cpu().numpy() for name, value in point.statistics.items() if name in read}


def _check_point(
    point: bytes,
    weights: bytes,
    reference: nn.Module,
    ranks: Mapping[str, int],
    statistics: Mapping[str, Tensor],
    x: Tensor,
    name: str,
) -> None:
    """Run the point as plain onnxruntime will, from files, with a batch and with one sample.

    Raises:
        ExportError: it does not compute what `reference` does at these ranks.
    """
    with evaluating(reference), torch.inference_mode():
        expected = forward_at(reference, ranks, x, buffers=statistics).numpy()
    with loaded(point, weights) as session:
        for size in (len(x), 1):
            output = session.run([OUTPUT], {INPUT: x[:size].numpy()})[0]
            error = float(np.abs(output - expected[:size]).max())
            scale = max(1.0, float(np.abs(expected).max()))
            if error <= TOLERANCE * scale:
                continue
            if not error <= ROUNDINGS * _rounding(reference, ranks, x, statistics, expected):
                raise ExportError(
                    f"{name}: ONNX Runtime's output differs from torch's by {error:.2g}, "
                    f"more than {TOLERANCE} of the largest output, {scale:.3g}"
                )


def _rounding(
    model: nn.Module,
    ranks: Mapping[str, int],
    x: Tensor,
    statistics: Mapping[str, Tensor],
    expected: np.ndarray,
) -> float:
    """Return by how much `expected` differs, at most, from what 64-bit floats give.

    A deep network adds it up: 2e-4 of the largest output for a ResNet-50 of little training.
    Of a network that converts what it reads, and so can't run in 64 bits, it is 0.
    """
    exact = copy.deepcopy(model).double()
    wide = {name: value.double() for name, value in statistics.items()}
    try:
        with evaluating(exact), torch.inference_mode():
            output = forward_at(exact, ranks, x.double(), buffers=wide)
    except RuntimeError:  # torch's for types that do not fit
        return 0.0
    return float(np.abs(output.numpy() - expected).max())
