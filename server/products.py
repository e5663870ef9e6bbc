"""Matrix products of a point with its first factors on the left, where a smaller rank is a prefix.

A runtime lays the right operand of a product out anew, for each rank differently, so that points
share none of it. The left one it reads as it is stored: a first factor of any rank is then the
beginning of the whole one, in memory once for all points: x downᵀ = (down xᵀ)ᵀ, and the second
product reads its left operand turned. The second factor stays on the right: on the left it took
1.1 to 1.6 times as long (AVX-512, 64 rows), and unpacked on the right 1.1 to 1.3 times.
"""

from dataclasses import dataclass
from math import prod

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

# The rows of x become columns, and kernels compute 16 at once. Measured on AVX-512: 1.00 to 1.09 of
# the time of packed weights at 64, 128 and 512 rows, but up to 1.2 at 50, 65 and 100.
_LANES = 16
_MOST_IDLE = 0.05


@dataclass(frozen=True, slots=True)
class _Pair:
    """x (batch, *inner, in) times down (rank, in), turned, is h; h times up (rank, out) is y."""

    x: str
    inner: tuple[int, ...]
    features: tuple[int, int]  # in, out
    down: str
    turned: str
    h: str
    up: str
    y: str


def down_first(model: ModelProto) -> ModelProto:
    """Return a graph with first factors on the left where a sample's rows fill the lanes.

    It computes the same, but for the order of sums; without such layers it comes back as it is.
    """
    pairs = {pair.y: pair for pair in _pairs(model)}
    if not pairs:
        return model
    replaced = {name for pair in pairs.values() for name in (pair.turned, pair.h)}
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    for node in model.graph.node:
        if node.output[0] in pairs:
            copy.graph.node.extend(_left(pairs[node.output[0]]))
        elif node.output[0] not in replaced:
            copy.graph.node.append(node)
    return copy


def _pairs(model: ModelProto) -> list[_Pair]:
    """Return the layers that are two products of a sequence whose length is known, and suits."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node}
    found = []
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            continue
        first = made.get(node.input[0])
        if first is None or first.op_type != "MatMul":
            continue
        turn = made.get(first.input[1])
        if turn is None or turn.op_type != "Transpose" or turn.input[0] not in weights:
            continue
        inner = shapes.get(first.input[0], ())[1:-1]
        if _fill_lanes(inner):
            features = (weights[turn.input[0]][1], weights[node.input[1]][1])
            names = (turn.input[0], turn.output[0], first.output[0], node.input[1], node.output[0])
            found.append(_Pair(first.input[0], inner, features, *names))
    return found


def _fill_lanes(inner: tuple[int, ...]) -> bool:
    rows = prod(inner)  # 0 where a length is not known
    return rows > 1 and -rows % _LANES <= _MOST_IDLE * rows


def _left(pair: _Pair) -> list[NodeProto]:
    fan_in, out = pair.features
    x, h, y, flat, whole = (f"{pair.y}.{part}" for part in ("x", "h", "rows", "flat", "whole"))
    return [
        _shape(flat, (-1, fan_in)),
        helper.make_node("Reshape", [pair.x, flat], [x]),  # (rows, in)
        helper.make_node("Gemm", [pair.down, x], [h], transB=1),  # (rank, rows)
        helper.make_node("Gemm", [h, pair.up], [y], transA=1),  # (rows, out)
        _shape(whole, (-1, *pair.inner, out)),
        helper.make_node("Reshape", [y, whole], [pair.y]),
    ]


def _shape(name: str, dims: tuple[int, ...]) -> NodeProto:
    value = helper.make_tensor(name, TensorProto.INT64, [len(dims)], dims)
    return helper.make_node("Constant", [], [name], value=value)
