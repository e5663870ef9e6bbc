"""Batch normalisation of a point: statistics of what the point itself computes, without torch.

A cut layer changes the mean and variance of what follows it, and those in the artifact are of the
whole network (METHOD: cumulative averages of batch statistics, as in "Slimmable Neural Networks",
Yu et al., 2019, and "Once-for-All", Cai et al., 2020). Inputs suffice; labels are not looked at.
Inputs here are not changed as training's are, which a trained point shows and is corrected for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from benchmarks.layer_latencies import Measuring, session_of
from server.interrupt import Interrupt

Floats = NDArray[np.float32]

_BATCH = 64


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    """How statistics of training's inputs differ from those of the inputs here.

    By the statistic's name in a gathered graph: what to add to a mean, and multiply a variance by.
    """

    means: Mapping[str, Floats]
    variances: Mapping[str, Floats]


NO_DRIFT = Drift({}, {})


def recalibrated(
    model: ModelProto, folder: Path, x: Floats, measuring: Measuring, drift: Drift = NO_DRIFT
) -> ModelProto:
    """Return a point whose normalisations have the statistics of its own activations on x, (n, …).

    Each layer is normalised by the statistics of its batch while they are gathered, as in training;
    batches count alike. They are then corrected by the `drift` of a point like this one. A graph
    without batch normalisation comes back as it is.
    """
    if not _normalisations(model):
        return model
    found = _gathered(model, folder, x, measuring)
    for name, offset in drift.means.items():
        found[name] = found[name] + offset
    for name, factor in drift.variances.items():
        found[name] = found[name] * factor
    return _with_statistics(model, found)


def drift_of(model: ModelProto, folder: Path, x: Floats, measuring: Measuring) -> Drift:
    """Return how a trained point's own statistics differ from those of its activations on x.

    Training shifts pictures and cuts holes, which moves the means and variances of all layers.
    """
    nodes = _normalisations(model)
    if not nodes:
        return NO_DRIFT
    own = statistics(model)
    trained = {name: numpy_helper.to_array(tensor, str(folder)) for name, tensor in own.items()}
    found = _gathered(model, folder, x, measuring)
    means, variances = {}, {}
    for node in nodes:
        mean, var = _statistics(node)
        means[mean] = trained[node.input[3]] - found[mean]
        ones = np.ones_like(found[var])
        variances[var] = np.divide(
            trained[node.input[4]], found[var], out=ones, where=found[var] > 0
        )
    return Drift(means, variances)


def _gathered(
    model: ModelProto, folder: Path, x: Floats, measuring: Measuring
) -> dict[str, Floats]:
    """Return the mean and variance per channel of what each normalisation of the point reads."""
    session = session_of(_gathering(model), folder, measuring.intra_op_threads)
    names = [name for node in _normalisations(model) for name in _statistics(node)]
    batches = max(1, len(x) // _BATCH)
    input_name = model.graph.input[0].name
    sums = [np.zeros(1, np.float32)] * len(names)
    parts = np.array_split(x, batches)
    feeds = ({input_name: part} for part in parts)
    runs = (partial(Interrupt.run, session=session, names=names, feed=feed) for feed in feeds)
    for found in measuring.in_turns(runs):
        sums = [total + value for total, value in zip(sums, found, strict=True)]
    return {name: total / np.float32(batches) for name, total in zip(names, sums, strict=True)}


def _normalisations(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == "BatchNormalization"]


def statistics(model: ModelProto) -> dict[str, TensorProto]:
    """Return the means and variances that a point is normalised by, by name."""
    names = {name for node in _normalisations(model) for name in node.input[3:5]}
    return {t.name: t for t in model.graph.initializer if t.name in names}


def _statistics(node: NodeProto) -> tuple[str, str]:
    return f"{node.output[0]}.mean", f"{node.output[0]}.var"


def _gathering(model: ModelProto) -> ModelProto:
    """Return a graph that normalises by batch statistics, and has them among its outputs."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    dims = _dims(model)
    for node in model.graph.node:
        if node.op_type != "BatchNormalization":
            copy.graph.node.append(node)
            continue
        copy.graph.node.extend(_by_batch(node, dims[node.input[0]]))
        for name in _statistics(node):
            copy.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return copy


def _dims(model: ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {value.name: len(value.type.tensor_type.shape.dim) for value in values}


def _by_batch(node: NodeProto, dims: int) -> list[NodeProto]:
    """Return nodes that gather the mean and variance per channel, and normalise by them.

    The mean of squares would lose digits, so the mean is subtracted before squaring.
    """
    x, scale, shift = node.input[:3]
    mean, var = _statistics(node)
    y = node.output[0]
    axes = helper.make_tensor(f"{y}.axes", TensorProto.INT64, [dims - 1], [0, *range(2, dims)])
    flat = helper.make_tensor(f"{y}.flat", TensorProto.INT64, [1], [-1])
    normalise = helper.make_node("BatchNormalization", [x, scale, shift, mean, var], [y])
    normalise.attribute.extend(a for a in node.attribute if a.name == "epsilon")
    return [
        helper.make_node("Constant", [], [f"{y}.axes"], value=axes),
        helper.make_node("Constant", [], [f"{y}.flat"], value=flat),
        helper.make_node("ReduceMean", [x, f"{y}.axes"], [f"{y}.centre"], keepdims=1),
        helper.make_node("Sub", [x, f"{y}.centre"], [f"{y}.off"]),
        helper.make_node("Mul", [f"{y}.off", f"{y}.off"], [f"{y}.squares"]),
        helper.make_node("ReduceMean", [f"{y}.squares", f"{y}.axes"], [f"{y}.spread"], keepdims=1),
        helper.make_node("Reshape", [f"{y}.centre", f"{y}.flat"], [mean]),
        helper.make_node("Reshape", [f"{y}.spread", f"{y}.flat"], [var]),
        normalise,
    ]


def _with_statistics(model: ModelProto, means: Mapping[str, Floats]) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    for node in _normalisations(copy):
        node.input[3:5] = _statistics(node)
    for name, value in means.items():
        tensor = numpy_helper.from_array(value.astype(np.float32), name)
        copy.graph.initializer.append(tensor)
    read = {name for node in copy.graph.node for name in node.input}
    kept = [tensor for tensor in copy.graph.initializer if tensor.name in read]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy
