"""From the template and ranks to the ONNX graph of one point. Knows no torch and no latency.

The template is the trained network with one node per factorised layer, `maestro::LowRankLinear` or
`maestro::LowRankConv2d`, and the index of the weights file: an initializer for each tensor in it.
A point is plain ONNX: those nodes replaced by two factors of the point's rank, or by the dense
layer where that is cheaper. Factors are rank-major, so a smaller rank is the same offset into the
weights file and a shorter length.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from maestro_core.artifact import Layer

DOMAIN = "maestro"
LOCATION = "weights.bin"
PAGE_BYTES = 4096
LINE = 64
# Shapes, axes and scalars stay in the graph, where the runtime reads them without a file.
INLINE_BYTES = 64


def pack(template: ModelProto, layers: Sequence[Layer]) -> tuple[ModelProto, bytes]:
    """Move the weights into one file; return the template that refers to it, and the file.

    Adds `LAYER.dense`, (out, in, …), for each layer that is cheaper dense at its full rank, and
    `LAYER.down.zeros` and `LAYER.up.zeros`, one row each, for rank 0.
    """
    packed = ModelProto()
    packed.CopyFrom(template)
    del packed.graph.initializer[:]
    tensors = {t.name: numpy_helper.to_array(t) for t in template.graph.initializer}
    weights = bytearray()
    placed = place_(weights, {**tensors, **_derived(tensors, layers)})
    packed.graph.initializer.extend(placed.values())
    return packed, bytes(weights)


def place_(weights: bytearray, tensors: Mapping[str, np.ndarray]) -> dict[str, TensorProto]:
    """Append tensors to the weights file; return, by name, the initializers that refer to them.

    A page or more begins on a page, so that it can be mapped alone; less on a cache line.
    """
    placed = {}
    for name, value in tensors.items():
        if value.nbytes <= INLINE_BYTES:
            placed[name] = numpy_helper.from_array(value, name)
            continue
        weights.extend(bytes(-len(weights) % (PAGE_BYTES if value.nbytes >= PAGE_BYTES else LINE)))
        data = np.ascontiguousarray(value).tobytes()
        dtype = helper.np_dtype_to_tensor_dtype(value.dtype)
        placed[name] = _external(name, dtype, value.shape, len(weights), len(data))
        weights.extend(data)
    return placed


def build(
    template: ModelProto,
    layers: Sequence[Layer],
    ranks: Sequence[int],
    private: Mapping[str, TensorProto] = MappingProxyType({}),
) -> ModelProto:
    """Return the plain ONNX graph of the point with these ranks, one per layer.

    `private` initializers take the place of the template's: the point's own normalisation.

    Raises:
        ValueError: a rank out of range, or one at which the layer should be dense but is not whole.
    """
    _check(layers, ranks)
    tensors = {**{t.name: t for t in template.graph.initializer}, **private}
    dims = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*template.graph.value_info, *template.graph.input, *template.graph.output)
    }
    by_down = {
        f"{layer.name}.down": (layer, rank) for layer, rank in zip(layers, ranks, strict=True)
    }
    nodes: list[NodeProto] = []
    for node in template.graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        layer, rank = by_down[node.input[1]]
        _truncate(tensors, layer, rank)
        nodes.extend(_expand(node, layer, rank, dims[node.output[0]]))
    return _assemble(template, nodes, tensors)


def _derived(tensors: Mapping[str, np.ndarray], layers: Iterable[Layer]) -> dict[str, np.ndarray]:
    derived = {}
    for layer in layers:
        down, up = tensors[f"{layer.name}.down"], tensors[f"{layer.name}.up"]
        if layer.is_dense(layer.max_rank):
            dense = up.T.astype(np.float64) @ down.reshape(layer.max_rank, layer.fan_in)
            shape = (layer.out_features, *down.shape[1:])
            derived[f"{layer.name}.dense"] = dense.astype(np.float32).reshape(shape)
        for name, factor in (("down", down), ("up", up)):
            derived[f"{layer.name}.{name}.zeros"] = np.zeros((1, *factor.shape[1:]), np.float32)
    return derived


def _check(layers: Sequence[Layer], ranks: Sequence[int]) -> None:
    if len(ranks) != len(layers):
        raise ValueError(f"{len(ranks)} ranks for {len(layers)} layers")
    for layer, rank in zip(layers, ranks, strict=True):
        if not 0 <= rank <= layer.max_rank:
            raise ValueError(f"layer '{layer.name}' has ranks 0..{layer.max_rank}, not {rank}")
        if layer.is_dense(rank) and rank != layer.max_rank:
            raise ValueError(
                f"layer '{layer.name}' is cheaper dense than at rank {rank}: "
                f"use its full rank {layer.max_rank}"
            )


def _truncate(tensors: dict[str, TensorProto], layer: Layer, rank: int) -> None:
    """Cut the factors of `layer` to a prefix of `rank` rows; rank 0 is one row of zeros."""
    for factor in (f"{layer.name}.down", f"{layer.name}.up"):
        if rank:
            tensors[factor] = _prefix(tensors[factor], rank)
        else:
            tensors[factor] = _renamed(tensors[f"{factor}.zeros"], factor)


def _prefix(tensor: TensorProto, rows: int) -> TensorProto:
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.from_array(numpy_helper.to_array(tensor)[:rows], tensor.name)
    entries = {
        entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"
    }
    shape = (rows, *tensor.dims[1:])
    length = entries["length"] // tensor.dims[0] * rows
    return _external(tensor.name, tensor.data_type, shape, entries["offset"], length)


def _renamed(tensor: TensorProto, name: str) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def _expand(node: NodeProto, layer: Layer, rank: int, dims: int) -> list[NodeProto]:
    x, down, up, *bias = node.input
    y = node.output[0]
    if layer.kind == "conv2d":
        return _conv(node, layer, rank)
    dense = f"{layer.name}.dense"
    h = f"{layer.name}.h"
    if dims == 2:
        if layer.is_dense(rank):
            return [helper.make_node("Gemm", [x, dense, *bias], [y], layer.name, transB=1)]
        return [
            helper.make_node("Gemm", [x, down], [h], f"{layer.name}/down", transB=1),
            helper.make_node("Gemm", [h, up, *bias], [y], f"{layer.name}/up"),
        ]
    # More than two dimensions: Gemm takes two only. The transposes are of constants, done at load.
    product = f"{layer.name}.product" if bias else y
    add = [helper.make_node("Add", [product, *bias], [y], f"{layer.name}/bias")] if bias else []
    matrix = dense if layer.is_dense(rank) else down
    turned = f"{matrix}.T"
    first = helper.make_node("Transpose", [matrix], [turned], perm=[1, 0])
    if layer.is_dense(rank):
        return [first, helper.make_node("MatMul", [x, turned], [product], layer.name), *add]
    return [
        first,
        helper.make_node("MatMul", [x, turned], [h], f"{layer.name}/down"),
        helper.make_node("MatMul", [h, up], [product], f"{layer.name}/up"),
        *add,
    ]


def _conv(node: NodeProto, layer: Layer, rank: int) -> list[NodeProto]:
    x, down, up, *bias = node.input
    y = node.output[0]
    window = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if layer.is_dense(rank):
        dense = f"{layer.name}.dense"
        return [helper.make_node("Conv", [x, dense, *bias], [y], layer.name, **window)]
    h, turned, kernel = f"{layer.name}.h", f"{up}.T", f"{up}.kernel"
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    # The 1×1 kernel is (out, rank, 1, 1); from rank-major it needs a transpose, done at load.
    return [
        helper.make_node("Conv", [x, down], [h], f"{layer.name}/down", **window),
        helper.make_node("Transpose", [up], [turned], perm=[1, 0]),
        helper.make_node("Constant", [], [f"{kernel}.axes"], value=axes),
        helper.make_node("Unsqueeze", [turned, f"{kernel}.axes"], [kernel]),
        helper.make_node("Conv", [h, kernel, *bias], [y], f"{layer.name}/up"),
    ]


def _assemble(
    template: ModelProto, nodes: Sequence[NodeProto], tensors: Mapping[str, TensorProto]
) -> ModelProto:
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        template.graph.name,
        template.graph.input,
        template.graph.output,
        [tensor for name, tensor in tensors.items() if name in read],
    )
    opsets = [entry for entry in template.opset_import if entry.domain != DOMAIN]
    return helper.make_model(graph, opset_imports=opsets, ir_version=template.ir_version)


def _external(
    name: str, data_type: int, shape: Sequence[int], offset: int, length: int
) -> TensorProto:
    tensor = TensorProto(name=name, data_type=data_type, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", LOCATION), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def load_template(data: bytes) -> ModelProto:
    """Return the template from its bytes, without reading the weights file."""
    return onnx.load_model_from_string(data)
