"""From the template and ranks to the ONNX graph of one point. Knows no torch and no latency.

The template is the trained network with one node per call of a factorised layer,
`maestro::LowRankLinear` or `maestro::LowRankConv2d`, and the index of the weights file: an
initializer for each tensor in it. A point is plain ONNX: those nodes replaced by two factors of the
point's rank, or by the dense layer where that is cheaper: by MACs, or as the caller says. At rank 0
nothing is computed: a layer's bias, or zero, is repeated. Factors are rank-major, so a smaller rank
is the same offset into the weights file and a shorter length.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from maestro_core.artifact import Layer

DOMAIN = "maestro"
LOCATION = "weights.bin"
PAGE_BYTES = 4096
LINE = 64
# Shapes, axes and scalars stay in the graph, where the runtime reads them without a file. It must:
# it infers shapes from the integers before it opens one. The pads of 5 dimensions are 80 bytes.
INLINE_BYTES = 64
INLINE_INTEGERS = 32


def pack(template: ModelProto, layers: Sequence[Layer]) -> tuple[ModelProto, bytes]:
    """Move the weights into one file; return the template that refers to it, and the file.

    Adds `LAYER.dense`, (out, in, …), for each layer that is cheaper dense at its full rank.
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
        is_shape = value.dtype == np.int64 and value.size <= INLINE_INTEGERS
        if is_shape or value.nbytes <= INLINE_BYTES:
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
    dense: Collection[str] | None = None,
) -> ModelProto:
    """Return the plain ONNX graph of the point with these ranks, one per layer.

    `private` initializers are added, or take the place of the template's: the point's own
    normalisation. `dense` names the layers to run dense, at their full rank; None stands for those
    that have fewer MACs so.

    Raises:
        ValueError: a rank out of range, a layer to be dense that is not whole, or without weights.
    """
    if dense is None:
        dense = {n.name for n, rank in zip(layers, ranks, strict=False) if n.is_dense(rank)}
    _check(layers, ranks, dense)
    tensors = {**{t.name: t for t in template.graph.initializer}, **private}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*template.graph.value_info, *template.graph.input, *template.graph.output)
    }
    by_down = {
        f"{layer.name}.down": (layer, rank) for layer, rank in zip(layers, ranks, strict=True)
    }
    nodes: list[NodeProto] = []
    calls = Counter[str]()
    for node in template.graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        layer, rank = by_down[node.input[1]]
        calls[layer.name] += 1
        name = layer.name if calls[layer.name] == 1 else f"{layer.name}.{calls[layer.name]}"
        shape = shapes[node.output[0]]
        if layer.name in dense:
            if f"{layer.name}.dense" not in tensors:
                raise ValueError(f"layer '{layer.name}' has no dense weights here")
            nodes.extend(_dense(node, layer, name, len(shape)))
        elif rank:
            for factor in (f"{layer.name}.down", f"{layer.name}.up"):
                tensors[factor] = _prefix(tensors[factor], rank)
            nodes.extend(_factors(node, layer, name, len(shape)))
        else:
            nodes.extend(_repeated(node, layer, name, shape))
    return _assemble(template, nodes, tensors)


def _derived(tensors: Mapping[str, np.ndarray], layers: Iterable[Layer]) -> dict[str, np.ndarray]:
    return {
        f"{layer.name}.dense": _product(tensors[f"{layer.name}.down"], tensors[f"{layer.name}.up"])
        for layer in layers
        if layer.is_dense(layer.max_rank)
    }


def dense_weights(
    template: ModelProto, layers: Iterable[Layer], folder: Path
) -> dict[str, TensorProto]:
    """Return `LAYER.dense` for the layers of a packed template that have none, to be `private`.

    `folder` holds the weights file.
    """
    tensors = {tensor.name: tensor for tensor in template.graph.initializer}

    def read(name: str) -> np.ndarray:
        return numpy_helper.to_array(tensors[name], str(folder))

    names = (layer.name for layer in layers if f"{layer.name}.dense" not in tensors)
    return {
        f"{name}.dense": numpy_helper.from_array(
            _product(read(f"{name}.down"), read(f"{name}.up")), f"{name}.dense"
        )
        for name in names
    }


def _product(down: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Return the dense weights, (out, in, …), of factors (rank, in, …) and (rank, out)."""
    dense: np.ndarray = up.T.astype(np.float64) @ down.reshape(len(down), -1)
    return dense.astype(np.float32).reshape(up.shape[1], *down.shape[1:])


def _check(layers: Sequence[Layer], ranks: Sequence[int], dense: Collection[str]) -> None:
    if len(ranks) != len(layers):
        raise ValueError(f"{len(ranks)} ranks for {len(layers)} layers")
    for layer, rank in zip(layers, ranks, strict=True):
        if not 0 <= rank <= layer.max_rank:
            raise ValueError(f"layer '{layer.name}' has ranks 0..{layer.max_rank}, not {rank}")
        if layer.name in dense and rank != layer.max_rank:
            raise ValueError(
                f"layer '{layer.name}' is cheaper dense than at rank {rank}: "
                f"use its full rank {layer.max_rank}"
            )


def _prefix(tensor: TensorProto, rows: int) -> TensorProto:
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.from_array(numpy_helper.to_array(tensor)[:rows], tensor.name)
    entries = {
        entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"
    }
    shape = (rows, *tensor.dims[1:])
    length = entries["length"] // tensor.dims[0] * rows
    return _external(tensor.name, tensor.data_type, shape, entries["offset"], length)


def _dense(node: NodeProto, layer: Layer, name: str, dims: int) -> list[NodeProto]:
    """Return the nodes of a call of a dense layer; its output has so many dimensions."""
    x, _, _, *bias = node.input
    y, dense = node.output[0], f"{layer.name}.dense"
    if layer.kind == "conv2d":
        return [helper.make_node("Conv", [x, dense, *bias], [y], name, **_window(node))]
    if dims == 2:
        return [helper.make_node("Gemm", [x, dense, *bias], [y], name, transB=1)]
    turned = f"{name}.dense.T"
    product, add = _biased(node, name)
    return [
        helper.make_node("Transpose", [dense], [turned], perm=[1, 0]),
        helper.make_node("MatMul", [x, turned], [product], name),
        *add,
    ]


def _factors(node: NodeProto, layer: Layer, name: str, dims: int) -> list[NodeProto]:
    """Return the nodes of a call of a layer in two factors; its output has so many dimensions."""
    x, down, up, *bias = node.input
    y, h = node.output[0], f"{name}.h"
    names = f"{name}/down", f"{name}/up"
    if layer.kind == "conv2d":
        return _conv_factors(node, name)
    if dims == 2:
        return [
            helper.make_node("Gemm", [x, down], [h], names[0], transB=1),
            helper.make_node("Gemm", [h, up, *bias], [y], names[1]),
        ]
    # More than two dimensions: Gemm takes two only. The transposes are of constants, done at load.
    turned = f"{name}.down.T"
    product, add = _biased(node, name)
    return [
        helper.make_node("Transpose", [down], [turned], perm=[1, 0]),
        helper.make_node("MatMul", [x, turned], [h], names[0]),
        helper.make_node("MatMul", [h, up], [product], names[1]),
        *add,
    ]


def _conv_factors(node: NodeProto, name: str) -> list[NodeProto]:
    x, down, up, *bias = node.input
    h, turned, kernel = f"{name}.h", f"{name}.up.T", f"{name}.up.kernel"
    # The 1×1 kernel is (out, rank, 1, 1); from rank-major it needs a transpose, done at load.
    return [
        helper.make_node("Conv", [x, down], [h], f"{name}/down", **_window(node)),
        helper.make_node("Transpose", [up], [turned], perm=[1, 0]),
        _constant(f"{kernel}.axes", [2, 3]),
        helper.make_node("Unsqueeze", [turned, f"{kernel}.axes"], [kernel]),
        helper.make_node("Conv", [h, kernel, *bias], [node.output[0]], f"{name}/up"),
    ]


def _repeated(node: NodeProto, layer: Layer, name: str, shape: Sequence[int]) -> list[NodeProto]:
    """Return the nodes of a call at rank 0; its output has this shape, 0 where that varies.

    What varies are the leading dimensions: they are those of the input.
    """
    x, _, _, *bias = node.input
    own = 3 if layer.kind == "conv2d" else 1  # the dimensions that are the layer's
    if 0 in shape[-own:]:
        raise ValueError(f"layer '{layer.name}' at rank 0 needs a height and width that are known")
    leading, end, whole = f"{name}.leading", f"{name}.end", f"{name}.shape"
    nodes = [
        helper.make_node("Shape", [x], [leading], end=-own),
        _constant(end, shape[-own:]),
        helper.make_node("Concat", [leading, end], [whole], axis=0),
    ]
    if not bias:
        return [*nodes, helper.make_node("ConstantOfShape", [whole], node.output, name)]
    repeated = bias[0]
    if own > 1:
        repeated, axes = f"{name}.repeated", f"{name}.repeated.axes"
        nodes += [_constant(axes, [1, 2]), helper.make_node("Unsqueeze", [*bias, axes], [repeated])]
    return [*nodes, helper.make_node("Expand", [repeated, whole], node.output, name)]


def _constant(name: str, values: Sequence[int]) -> NodeProto:
    tensor = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
    return helper.make_node("Constant", [], [name], value=tensor)


def _window(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _biased(node: NodeProto, name: str) -> tuple[str, list[NodeProto]]:
    """Return what a product is to be called, and what adds the bias to it."""
    bias, y = node.input[3:], node.output[0]
    if not bias:
        return y, []
    product = f"{name}.product"
    return product, [helper.make_node("Add", [product, *bias], [y], f"{name}/bias")]


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


def load(data: bytes) -> ModelProto:
    """Return the template or a point's graph from its bytes, without reading the weights file."""
    return onnx.load_model_from_string(data)
