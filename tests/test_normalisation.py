"""Statistics of a point's own activations, against numpy's on the same graph."""

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from benchmarks.layer_latencies import Measuring, session_of
from benchmarks.normalisation import NO_DRIFT, drift_of, recalibrated, statistics

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((3, 2, 1, 1)).astype(np.float32)
SCALE, SHIFT = (RNG.uniform(0.5, 1.5, 3).astype(np.float32) for _ in range(2))
X = (RNG.standard_normal((40, 2, 4, 4)) * 3 + 5).astype(np.float32)


def model(
    normalised: bool = True,
    kernel: np.ndarray = KERNEL,
    mean: np.ndarray | float = 0.0,
    var: np.ndarray | float = 1.0,
) -> ModelProto:
    """Return a 1×1 convolution with, or without, its normalisation, by wrong statistics."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["c" if normalised else "y"])]
    if normalised:
        names = ["scale", "shift", "mean", "var"]
        nodes.append(helper.make_node("BatchNormalization", ["c", *names], ["y"], epsilon=1e-3))
    own = {"mean": np.full(3, mean, np.float32), "var": np.full(3, var, np.float32)}
    weights = {"w": kernel, "scale": SCALE, "shift": SHIFT, **own}
    read = {name for node in nodes for name in node.input}
    body = helper.make_graph(
        nodes,
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items() if name in read],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def expected() -> np.ndarray:
    c = np.einsum("oi,bihw->bohw", KERNEL[:, :, 0, 0].astype(float), X.astype(float))
    mean, var = c.mean((0, 2, 3), keepdims=True), c.var((0, 2, 3), keepdims=True)
    scale, shift = (part.reshape(1, 3, 1, 1) for part in (SCALE, SHIFT))
    normalised: np.ndarray = (c - mean) / np.sqrt(var + 1e-3) * scale + shift
    return normalised


def test_outputs_are_normalised_by_their_own_statistics(tmp_path: Path) -> None:
    found = recalibrated(model(), tmp_path, X, Measuring(budget_s=1.0))

    (whole,) = session_of(found, tmp_path, 1).run(None, {"x": X})
    (one,) = session_of(found, tmp_path, 1).run(None, {"x": X[:1]})
    assert whole == pytest.approx(expected(), abs=1e-4)
    assert one == pytest.approx(expected()[:1], abs=1e-4)


def test_the_statistics_of_a_point_are_told_from_its_weights() -> None:
    assert set(statistics(model())) == {"mean", "var"}


def test_the_statistics_it_had_are_gone(tmp_path: Path) -> None:
    found = recalibrated(model(), tmp_path, X, Measuring(budget_s=1.0))

    names = {tensor.name for tensor in found.graph.initializer}
    assert names == {"w", "scale", "shift", "y.mean", "y.var"}


def moments(kernel: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    c = np.einsum("oi,bihw->bohw", kernel[:, :, 0, 0].astype(float), x.astype(float))
    return c.mean((0, 2, 3)), c.var((0, 2, 3))


def test_what_training_changes_of_inputs_is_taken_from_a_trained_point(tmp_path: Path) -> None:
    changed, other = 0.7 * X - 2, KERNEL + 0.1 * RNG.standard_normal(KERNEL.shape)
    mean, var = moments(KERNEL, changed)
    budget = Measuring(budget_s=1.0)

    drift = drift_of(model(True, KERNEL, mean, var), tmp_path, X, budget)

    same = statistics(recalibrated(model(), tmp_path, X, budget, drift))
    assert numpy_helper.to_array(same["y.mean"]) == pytest.approx(mean, abs=1e-4)
    assert numpy_helper.to_array(same["y.var"]) == pytest.approx(var, rel=1e-4)
    point = model(True, other.astype(np.float32))
    near, far = (statistics(recalibrated(point, tmp_path, X, budget, d)) for d in (drift, NO_DRIFT))
    for name, right in zip(("y.mean", "y.var"), moments(other, changed), strict=True):
        off, uncorrected = (abs(numpy_helper.to_array(s[name]) - right).max() for s in (near, far))
        assert off < 0.5 * uncorrected


def test_a_channel_that_is_constant_here_keeps_a_finite_variance(tmp_path: Path) -> None:
    budget = Measuring(budget_s=1.0)

    drift = drift_of(model(), tmp_path, np.zeros_like(X), budget)

    found = statistics(recalibrated(model(), tmp_path, np.zeros_like(X), budget, drift))
    assert numpy_helper.to_array(found["y.var"]) == pytest.approx(0)


def test_a_point_without_normalisation_comes_back_as_it_is(tmp_path: Path) -> None:
    plain = model(normalised=False)

    assert recalibrated(plain, tmp_path, X, Measuring(budget_s=1.0)) is plain
    assert drift_of(plain, tmp_path, X, Measuring(budget_s=1.0)) == NO_DRIFT
