"""Networks to measure on, as artifacts with seeded random weights: latency doesn't know.

ResNet-18 as on CIFAR-10 (3×3 stem, no max-pool; He et al., 2016, with the max ranks of Maestro,
ICML 2024), a transformer encoder of 6 layers, width 384, on 64 tokens, and LeNet (LeCun et al.,
1998, as `maestro_core/models/lenet.py` has it). Scores are made up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from maestro_core import artifact, graph
from maestro_core.artifact import (
    Artifact,
    Layer,
    Manifest,
    Metric,
    OperatingPoint,
    Score,
    Tensor,
)

_TOKENS, _WIDTH, _FEED_FORWARD, _HEADS, _DEPTH = 64, 384, 1536, 6, 6


@dataclass(frozen=True, slots=True)
class Network:
    """A template with its layers; input and output shapes are those of one sample."""

    name: str
    template: ModelProto
    layers: tuple[Layer, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def uniform(self, share: float) -> tuple[int, ...]:
        """Return `share` of every layer's full rank, at least 1; full where dense is cheaper."""
        ranks = (max(1, round(share * layer.max_rank)) for layer in self.layers)
        return tuple(
            layer.max_rank if layer.is_dense(rank) else rank
            for layer, rank in zip(self.layers, ranks, strict=True)
        )

    def uniform_chain(self, points: int) -> list[tuple[int, ...]]:
        """Return nested points in which every layer grows at every step."""
        return [self.uniform((i + 1) / points) for i in range(points)]

    def staggered_chain(self, points: int, stride: int) -> list[tuple[int, ...]]:
        """Return nested points in which a layer grows at every `stride`-th, each at its own ones.

        Chains found by a sweep over convex hulls are like this: from one point to the next a few
        layers grow, and the others are the same in both.
        """
        offsets = np.random.default_rng(0).permutation(len(self.layers)) % stride
        grown = [0] * len(self.layers)
        chain = []
        for i in range(points):
            for j, offset in enumerate(offsets):
                if i % stride == offset or i == points - 1:
                    grown[j] = i
            chain.append(tuple(self.uniform((at + 1) / points)[j] for j, at in enumerate(grown)))
        return chain

    def save(self, path: Path, chain: Sequence[Sequence[int]]) -> Artifact:
        """Write the artifact whose points have these ranks, cheapest first."""
        template, weights = graph.pack(self.template, self.layers)
        contents = {artifact.WEIGHTS: weights, artifact.TEMPLATE: template.SerializeToString()}
        points = []
        for i, ranks in enumerate(chain):
            name = f"points/{i:02}.onnx"
            contents[name] = graph.build(template, self.layers, ranks).SerializeToString()
            points.append(self._point(tuple(ranks), i, name))
        return artifact.save(path, self._manifest(tuple(points)), contents)

    def _point(self, ranks: tuple[int, ...], i: int, name: str) -> OperatingPoint:
        pairs = list(zip(self.layers, ranks, strict=True))
        return OperatingPoint(
            ranks=ranks,
            precision="fp32",
            score=Score(0.5 + 0.01 * i, 0.49 + 0.01 * i, 0.51 + 0.01 * i),
            macs=sum(layer.macs(rank) for layer, rank in pairs),
            params=sum(layer.params(rank) for layer, rank in pairs),
            graph=name,
        )

    def _manifest(self, points: tuple[OperatingPoint, ...]) -> Manifest:
        return Manifest(
            format=artifact.FORMAT,
            name=self.name,
            version="1",
            task="benchmark",
            input=Tensor("x", "float32", (-1, *self.input_shape)),
            output=Tensor("y", "float32", (-1, *self.output_shape)),
            labels=None,
            metric=Metric("none", "random weights", 0, higher_is_better=True),
            dense_macs=sum(
                layer.out_features * layer.fan_in * layer.positions for layer in self.layers
            ),
            dense_params=sum(layer.out_features * layer.fan_in for layer in self.layers),
            layers=self.layers,
            points=points,
            files={},
            provenance={"weights": "random, seed 0"},
        )


@dataclass(slots=True)
class _Builder:
    """Nodes, weights and layers as they are added; every method returns its output's name."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    dims: dict[str, int] = field(default_factory=dict)

    def node(self, kind: str, inputs: Sequence[str], **attributes: object) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))  # type: ignore[arg-type]
        return output

    def constant(self, name: str, value: Sequence[int]) -> str:
        self.weights[name] = np.array(value, np.int64)
        return name

    def factors(self, layer: Layer) -> list[str]:
        shape = (layer.in_features, *layer.kernel)
        # Variance is kept through both factors, so that deep networks stay finite.
        self.weights[f"{layer.name}.down"] = self._normal((layer.max_rank, *shape), layer.fan_in)
        self.weights[f"{layer.name}.up"] = self._normal(
            (layer.max_rank, layer.out_features), layer.max_rank
        )
        self.layers.append(layer)
        return [f"{layer.name}.down", f"{layer.name}.up"]

    def conv(self, x: str, layer: Layer, *bias: str) -> str:
        pads = [*layer.padding, *layer.padding]
        y = self.node(
            "LowRankConv2d",
            [x, *self.factors(layer), *bias],
            domain=graph.DOMAIN,
            strides=layer.stride,
            pads=pads,
            dilations=layer.dilation,
        )
        self.dims[y] = 4
        return y

    def biased_conv(self, x: str, layer: Layer) -> str:
        bias = f"{layer.name}.bias"
        self.weights[bias] = np.zeros(layer.out_features, np.float32)
        return self.conv(x, layer, bias)

    def normalised_conv(self, x: str, layer: Layer) -> str:
        """Add a convolution without bias, and its normalisation."""
        y = self.conv(x, layer)
        norms = []
        for part in ("scale", "shift", "mean", "var"):
            name = f"{layer.name}.norm.{part}"
            size = layer.out_features
            self.weights[name] = self.rng.uniform(0.5, 1.0, size).astype(np.float32)
            norms.append(name)
        return self.node("BatchNormalization", [y, *norms])

    def linear(self, x: str, name: str, fan_in: int, out: int, positions: int, dims: int) -> str:
        layer = Layer(name, "linear", fan_in, out, (), (), (), (), positions, min(fan_in, out))
        factors = self.factors(layer)
        self.weights[f"{name}.bias"] = np.zeros(out, np.float32)
        y = self.node("LowRankLinear", [x, *factors, f"{name}.bias"], domain=graph.DOMAIN)
        self.dims[y] = dims
        return y

    def norm(self, x: str, name: str) -> str:
        self.weights[f"{name}.scale"] = np.ones(_WIDTH, np.float32)
        self.weights[f"{name}.shift"] = np.zeros(_WIDTH, np.float32)
        return self.node("LayerNormalization", [x, f"{name}.scale", f"{name}.shift"], axis=-1)

    def network(
        self, name: str, y: str, input_shape: tuple[int, ...], output_shape: tuple[int, ...]
    ) -> Network:
        self.nodes.append(helper.make_node("Identity", [y], ["y"]))
        floats = TensorProto.FLOAT
        body = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info("x", floats, ["batch", *input_shape])],
            [helper.make_tensor_value_info("y", floats, ["batch", *output_shape])],
            [numpy_helper.from_array(value, key) for key, value in self.weights.items()],
            value_info=[
                helper.make_tensor_value_info(key, floats, [None] * dims)
                for key, dims in self.dims.items()
            ],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(graph.DOMAIN, 1)]
        template = helper.make_model(body, opset_imports=opsets, ir_version=10)
        return Network(name, template, tuple(self.layers), input_shape, output_shape)

    def _normal(self, shape: tuple[int, ...], fan_in: int) -> npt.NDArray[np.float32]:
        return self.rng.standard_normal(shape, np.float32) * np.float32(fan_in**-0.5)


def resnet18() -> Network:
    """Return ResNet-18 on 3×32×32 pictures, 21 layers, 0.555 GMACs."""
    b = _Builder()
    x = b.node("Relu", [b.normalised_conv("x", _window("stem", 3, 64, 3, 1, 32))])
    channels, side = 64, 32
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            side //= stride
            name = f"layer{stage + 1}.{block}"
            h = b.normalised_conv(x, _window(f"{name}.conv1", channels, width, 3, stride, side))
            h = b.node("Relu", [h])
            h = b.normalised_conv(h, _window(f"{name}.conv2", width, width, 3, 1, side))
            if stride == 2:
                x = b.normalised_conv(x, _window(f"{name}.shortcut", channels, width, 1, 2, side))
            x = b.node("Relu", [b.node("Add", [h, x])])
            channels = width
    x = b.node("Flatten", [b.node("GlobalAveragePool", [x])])
    return b.network("resnet18", b.linear(x, "fc", 512, 10, 1, 2), (3, 32, 32), (10,))


def encoder() -> Network:
    """Return a pre-norm transformer encoder on 64 embedded tokens, with a head of 10 classes."""
    b = _Builder()
    x = "x"
    for i in range(_DEPTH):
        x = b.node("Add", [x, _attention(b, b.norm(x, f"{i}.norm1"), f"{i}.attention")])
        h = b.linear(b.norm(x, f"{i}.norm2"), f"{i}.ff1", _WIDTH, _FEED_FORWARD, _TOKENS, 3)
        h = b.linear(b.node("Gelu", [h]), f"{i}.ff2", _FEED_FORWARD, _WIDTH, _TOKENS, 3)
        x = b.node("Add", [x, h])
    pooled = b.node("ReduceMean", [b.norm(x, "norm"), b.constant("tokens", [1])], keepdims=0)
    y = b.linear(pooled, "head", _WIDTH, 10, 1, 2)
    return b.network("encoder", y, (_TOKENS, _WIDTH), (10,))


def lenet() -> Network:
    """Return LeNet on 1×28×28 pictures, 5 layers, 281,640 MACs: next to nothing to compute."""
    b = _Builder()
    x, channels, side = "x", 1, 28
    for i, width in enumerate((6, 16)):
        side -= 4
        layer = replace(_window(f"conv{i + 1}", channels, width, 5, 1, side), padding=(0, 0))
        x = b.node("Relu", [b.biased_conv(x, layer)])
        x = b.node("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])
        channels, side = width, side // 2
    x, fan_in = b.node("Flatten", [x]), channels * side**2
    for i, width in enumerate((120, 84)):
        x = b.node("Relu", [b.linear(x, f"fc{i + 1}", fan_in, width, 1, 2)])
        fan_in = width
    return b.network("lenet", b.linear(x, "fc3", fan_in, 10, 1, 2), (1, 28, 28), (10,))


def _attention(b: _Builder, x: str, name: str) -> str:
    heads = b.constant("heads", [0, _TOKENS, _HEADS, _WIDTH // _HEADS])
    whole = b.constant("whole", [0, _TOKENS, _WIDTH])
    turned = []
    for part, order in (("query", (0, 2, 1, 3)), ("key", (0, 2, 3, 1)), ("value", (0, 2, 1, 3))):
        y = b.linear(x, f"{name}.{part}", _WIDTH, _WIDTH, _TOKENS, 3)
        turned.append(b.node("Transpose", [b.node("Reshape", [y, heads])], perm=order))
    query, key, value = turned
    b.weights["root"] = np.array((_WIDTH / _HEADS) ** 0.5, np.float32)
    weights = b.node("Div", [b.node("MatMul", [query, key]), "root"])
    mixed = b.node("MatMul", [b.node("Softmax", [weights], axis=-1), value])
    joined = b.node("Reshape", [b.node("Transpose", [mixed], perm=(0, 2, 1, 3)), whole])
    return b.linear(joined, f"{name}.out", _WIDTH, _WIDTH, _TOKENS, 3)


def _window(name: str, channels: int, out: int, kernel: int, stride: int, side: int) -> Layer:
    """Return a square convolution with `side`² output positions."""
    max_rank = min(out, channels * kernel**2)
    return Layer(
        name,
        "conv2d",
        channels,
        out,
        (kernel, kernel),
        (stride, stride),
        (kernel // 2,) * 2,
        (1, 1),
        side * side,
        max_rank,
    )
