"""First factors on the left: the same output, and ranks that are prefixes of one another."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from maestro_core import graph
from maestro_core.artifact import Layer
from server.baking import bake
from server.engine import session_options
from server.products import down_first

RANKS = (8, 12, 16)


def layer(tokens: int) -> Layer:
    return Layer("fc", "linear", 48, 40, (), (), (), (), positions=tokens, max_rank=40)


def template(tokens: int) -> ModelProto:
    """Return one linear layer, 48→40, on a sequence."""
    rng = np.random.default_rng(0)
    shapes = {"fc.down": (40, 48), "fc.up": (40, 40), "fc.bias": (40,)}
    body = helper.make_graph(
        [
            helper.make_node(
                "LowRankLinear", ["x", "fc.down", "fc.up", "fc.bias"], ["y"], domain=graph.DOMAIN
            )
        ],
        "sequence",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", tokens, 48])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", tokens, 40])],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in shapes.items()
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(graph.DOMAIN, 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=10)


def computed(x: NDArray[np.float32], rank: int) -> NDArray[np.float64]:
    """Return the layer's output, from its factors, in float64."""
    w = {t.name: numpy_helper.to_array(t).astype(float) for t in template(1).graph.initializer}
    output: NDArray[np.float64] = x @ w["fc.down"][:rank].T @ w["fc.up"][:rank] + w["fc.bias"]
    return output


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("rank", RANKS)
def test_the_output_is_the_same(rank: int, n: int) -> None:
    x = np.random.default_rng(n).standard_normal((n, 16, 48)).astype(np.float32)

    model = down_first(graph.build(template(16), [layer(16)], [rank]))
    (y,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})

    assert {"Gemm", "Reshape"} <= {node.op_type for node in model.graph.node}
    assert not {"MatMul", "Transpose"} & {node.op_type for node in model.graph.node}
    np.testing.assert_allclose(y, computed(x, rank), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 17, 50, 65])
def test_rows_that_leave_lanes_empty_stay_where_they_are(tokens: int) -> None:
    model = graph.build(template(tokens), [layer(tokens)], [8])

    assert down_first(model) is model


def test_a_dense_layer_stays_as_it_is() -> None:
    packed, _ = graph.pack(template(16), [layer(16)])
    model = graph.build(packed, [layer(16)], [40])

    assert down_first(model) is model


def test_points_share_a_first_factor(tmp_path: Path) -> None:
    packed, weights = graph.pack(template(16), [layer(16)])
    (tmp_path / graph.LOCATION).write_bytes(weights)
    paths = [tmp_path / f"{rank}.onnx" for rank in RANKS]
    for rank, path in zip(RANKS, paths, strict=True):
        path.write_bytes(graph.build(packed, [layer(16)], [rank]).SerializeToString())

    points = bake(paths, tmp_path / "baked", "this host", lambda: session_options(1))

    apart = sum(points.mapped_bytes([point]) for point in range(len(RANKS)))
    shared = 4 * 48 * (RANKS[0] + RANKS[1])  # bytes of the smaller first factors
    assert points.mapped_bytes(range(len(RANKS))) <= apart - shared
