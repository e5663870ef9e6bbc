"""Every point's graph, run by plain ONNX Runtime, against numpy at the same ranks."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from maestro_core import graph
from maestro_core.artifact import Artifact, Layer
from tests.conftest import TINY_LAYERS, TINY_RANKS, tiny_template

Floats = NDArray[np.float32]

WEIGHTS = {t.name: numpy_helper.to_array(t) for t in tiny_template().graph.initializer}


def tiny_forward(x: Floats, ranks: tuple[int, int]) -> Floats:
    """Return the tiny network's output (n, 10) for pictures (n, 1, 8, 8)."""
    a, b = ranks
    kernel = np.einsum("ro,rikl->oikl", WEIGHTS["conv.up"][:a], WEIGHTS["conv.down"][:a])
    windows = sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
    c = np.einsum("nihwkl,oikl->nohw", windows, kernel) + WEIGHTS["conv.bias"][:, None, None]
    f = np.maximum(c, 0).reshape(len(x), -1)
    y: Floats = f @ (WEIGHTS["fc.down"][:b].T @ WEIGHTS["fc.up"][:b]) + WEIGHTS["fc.bias"]
    return y


def run(path: Path, x: Floats) -> Floats:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    output: Floats = session.run(None, {"x": x})[0]
    return output


@pytest.mark.parametrize("point", range(len(TINY_RANKS)))
def test_a_point_computes_its_truncated_network(tiny_artifact: Artifact, point: int) -> None:
    x = np.random.default_rng(1).standard_normal((3, 1, 8, 8), dtype=np.float32)

    output = run(tiny_artifact.graph_path(point), x)

    expected = tiny_forward(x, TINY_RANKS[point])
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("ranks", [(0, 3), (2, 0), (0, 0)])
def test_rank_zero_leaves_the_bias(tiny_artifact: Artifact, ranks: tuple[int, int]) -> None:
    x = np.random.default_rng(1).standard_normal((3, 1, 8, 8), dtype=np.float32)
    template = onnx.load(tiny_artifact.template_path, load_external_data=False)
    path = tiny_artifact.path / "points/zero.onnx"
    path.write_bytes(graph.build(template, TINY_LAYERS, ranks).SerializeToString())

    np.testing.assert_allclose(run(path, x), tiny_forward(x, ranks), rtol=1e-4, atol=1e-3)


def test_a_point_loads_from_any_directory(
    tiny_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.zeros((1, 1, 8, 8), np.float32)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    run(tiny_artifact.graph_path(0), x)
    run(Path(os.path.relpath(tiny_artifact.graph_path(1))), x)


def test_a_point_is_plain_valid_onnx_of_a_few_kilobytes(tiny_artifact: Artifact) -> None:
    for point in range(len(TINY_RANKS)):
        path = tiny_artifact.graph_path(point)
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)

        assert {node.domain for node in model.graph.node} == {""}
        assert {entry.domain for entry in model.opset_import} == {""}
        assert path.stat().st_size < 4096


def test_smaller_ranks_are_prefixes_of_the_same_tensor(tiny_artifact: Artifact) -> None:
    extents = {}
    for point in (0, 1):
        model = onnx.load(tiny_artifact.graph_path(point), load_external_data=False)
        down = next(t for t in model.graph.initializer if t.name == "fc.down")
        extents[point] = {entry.key: entry.value for entry in down.external_data}

    assert extents[0]["offset"] == extents[1]["offset"]
    assert int(extents[1]["length"]) == 3 * int(extents[0]["length"]) == 3 * 384 * 4
    assert int(extents[0]["offset"]) % graph.PAGE_BYTES == 0


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((1,), "1 ranks for 2 layers"),
        ((7, 1), r"layer 'conv' has ranks 0\.\.6, not 7"),
        ((4, 1), "layer 'conv' is cheaper dense than at rank 4: use its full rank 6"),
    ],
)
def test_ranks_that_no_point_can_have_are_refused(ranks: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graph.build(tiny_template(), TINY_LAYERS, ranks)


@pytest.mark.parametrize("dense", [(), ("conv",), ("fc",), ("conv", "fc")])
def test_the_caller_says_what_is_dense(tiny_artifact: Artifact, dense: tuple[str, ...]) -> None:
    x = np.random.default_rng(1).standard_normal((3, 1, 8, 8), dtype=np.float32)
    template = onnx.load(tiny_artifact.template_path, load_external_data=False)
    path = tiny_artifact.path / "points/other.onnx"
    model = graph.build(template, TINY_LAYERS, (6, 10), dense=dense)
    path.write_bytes(model.SerializeToString())

    read = {tensor.name for tensor in model.graph.initializer}
    for layer in TINY_LAYERS:
        assert (f"{layer.name}.dense" in read) == (layer.name in dense)
        assert (f"{layer.name}.down" in read) == (layer.name not in dense)
    np.testing.assert_allclose(run(path, x), tiny_forward(x, (6, 10)), rtol=1e-4, atol=1e-3)


def test_dense_weights_that_the_file_lacks_are_made_from_factors(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((3, 1, 8, 8), dtype=np.float32)
    cut = (replace(TINY_LAYERS[0], max_rank=2), replace(TINY_LAYERS[1], max_rank=5))
    shrunk = tiny_template()
    for tensor in shrunk.graph.initializer:
        for layer in cut:
            if tensor.name in (f"{layer.name}.down", f"{layer.name}.up"):
                value = numpy_helper.to_array(tensor)[: layer.max_rank]
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    packed, blob = graph.pack(shrunk, cut)
    (tmp_path / "weights.bin").write_bytes(blob)

    with pytest.raises(ValueError, match="layer 'fc' has no dense weights here"):
        graph.build(packed, cut, (2, 5), dense=("fc",))
    made = graph.dense_weights(packed, cut, tmp_path)
    path = tmp_path / "dense.onnx"
    model = graph.build(packed, cut, (2, 5), made, ("conv", "fc"))
    path.write_bytes(model.SerializeToString())

    assert set(made) == {"conv.dense", "fc.dense"}
    np.testing.assert_allclose(run(path, x), tiny_forward(x, (2, 5)), rtol=1e-4, atol=1e-3)
    assert graph.dense_weights(graph.pack(tiny_template(), TINY_LAYERS)[0], TINY_LAYERS, path) == {}


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_a_linear_layer_on_sequences_matches_numpy(tmp_path: Path, rank: int) -> None:
    rng = np.random.default_rng(2)
    layer = Layer("fc", "linear", 5, 7, (), (), (), (), positions=4, max_rank=5)
    shapes = {"fc.down": (5, 5), "fc.up": (5, 7), "fc.bias": (7,)}
    weights = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    node = helper.make_node("LowRankLinear", ["x", *weights], ["y"], domain=graph.DOMAIN)
    body = helper.make_graph(
        [node],
        "sequence",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 7])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(graph.DOMAIN, 1)]
    packed, blob = graph.pack(helper.make_model(body, opset_imports=opsets, ir_version=10), [layer])
    (tmp_path / "weights.bin").write_bytes(blob)
    path = tmp_path / "point.onnx"
    path.write_bytes(graph.build(packed, [layer], [rank]).SerializeToString())
    x = rng.standard_normal((2, 4, 5), dtype=np.float32)

    output = run(path, x)

    matrix = weights["fc.down"][:rank].T @ weights["fc.up"][:rank]
    np.testing.assert_allclose(output, x @ matrix + weights["fc.bias"], rtol=1e-4, atol=1e-4)


REPEATED = [  # (kind, kernel, shape of x)
    pytest.param("linear", (), (5,), id="linear"),
    pytest.param("linear", (), (4, 5), id="linear on sequences"),
    pytest.param("conv2d", (1, 1), (5, 3, 2), id="convolution"),
]


@pytest.mark.parametrize(("kind", "kernel", "shape"), REPEATED)
@pytest.mark.parametrize("rank", [0, 2, 5])
def test_a_layer_that_is_called_again_reads_the_same_weights(
    tmp_path: Path,
    kind: Literal["linear", "conv2d"],
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    rank: int,
) -> None:
    rng = np.random.default_rng(2)
    once, none = ((1, 1), (0, 0)) if kernel else ((), ())
    layer = Layer("a", kind, 5, 5, kernel, once, none, once, positions=8, max_rank=5)
    shapes = {"a.down": (5, 5, *kernel), "a.up": (5, 5), "a.bias": (5,)}
    weights = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    op = {"linear": "LowRankLinear", "conv2d": "LowRankConv2d"}[kind]
    nodes = [helper.make_node(op, [x, *weights], [y], domain=graph.DOMAIN) for x, y in ("xh", "hy")]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name in "xyh"
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    body = helper.make_graph(
        nodes, "again", values[:1], values[1:2], tensors, value_info=values[2:]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(graph.DOMAIN, 1)]
    packed, blob = graph.pack(helper.make_model(body, opset_imports=opsets, ir_version=10), [layer])
    (tmp_path / "weights.bin").write_bytes(blob)
    path = tmp_path / "point.onnx"
    path.write_bytes(graph.build(packed, [layer], [rank]).SerializeToString())
    x = rng.standard_normal((2, *shape), dtype=np.float32)

    output = run(path, x)

    onnx.checker.check_model(str(path), full_check=True)
    matrix = weights["a.down"].reshape(5, 5)[:rank].T @ weights["a.up"][:rank]
    expected = np.moveaxis(x, 1, -1) if kernel else x
    for _ in range(2):
        expected = expected @ matrix + weights["a.bias"]
    expected = np.moveaxis(expected, -1, 1) if kernel else expected
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)
