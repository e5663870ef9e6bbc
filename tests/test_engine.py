"""The engine against the network computed in numpy, and its refusals."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from maestro_core import artifact
from maestro_core.artifact import Artifact, Tensor
from server.engine import Engine, EngineError
from tests.conftest import TINY_RANKS, tiny_contents, tiny_manifest, tiny_template


@pytest.fixture(params=["artifact", "baked", "baked, one point in memory"])
def engine(request: pytest.FixtureRequest, tiny_artifact: Artifact, tmp_path: Path) -> Engine:
    if request.param == "artifact":
        return Engine(tiny_artifact)
    budget_bytes = 0 if "one" in request.param else None
    return Engine(tiny_artifact, state_dir=tmp_path / "state", memory_budget_bytes=budget_bytes)


def pictures(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, 1, 8, 8)).astype(np.float32)


def computed(x: np.ndarray, ranks: tuple[int, int]) -> np.ndarray:
    """Return the tiny network's output, from its factors, in float64."""
    w = {t.name: numpy_helper.to_array(t) for t in tiny_template().graph.initializer}
    r, s = ranks
    kernel = np.einsum("ro,rikl->oikl", w["conv.up"][:r], w["conv.down"][:r], dtype=float)
    padded = np.pad(x[:, 0].astype(float), ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    maps = np.einsum("nhwkl,oikl->nohw", windows, kernel) + w["conv.bias"][:, None, None]
    features = np.maximum(maps, 0).reshape(len(x), -1)
    hidden = features @ w["fc.down"][:s].T
    output: np.ndarray = hidden @ w["fc.up"][:s] + w["fc.bias"]
    return output


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("point", range(len(TINY_RANKS)))
def test_every_point_computes_its_network(engine: Engine, point: int, n: int) -> None:
    x = pictures(n)

    y = engine.run(x, point)

    assert y.shape == (n, 10)
    np.testing.assert_allclose(y, computed(x, TINY_RANKS[point]), rtol=1e-4, atol=1e-3)


def test_points_in_flight_together_do_not_mix(engine: Engine) -> None:
    x = pictures(2)
    alone = [engine.run(x, point) for point in range(5)]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: (i % 5, engine.run(x, i % 5)), range(200)))

    assert all(np.array_equal(y, alone[point]) for point, y in together)


@pytest.mark.parametrize("point", [-1, 5])
def test_a_point_that_does_not_exist_is_refused(engine: Engine, point: int) -> None:
    with pytest.raises(EngineError, match=rf"point {point} does not exist; points are 0\.\.4"):
        engine.run(pictures(1), point)


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (0, 1, 8, 8), (1, 1, 8, 9), (1, 2, 8, 8), (1, 1, 8, 8, 1), ()]
)
def test_a_batch_of_another_shape_is_refused(engine: Engine, shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match=r"input 'x' has shape .* takes \[-1, 1, 8, 8\]"):
        engine.run(np.zeros(shape, np.float32), 0)


def test_a_batch_that_is_not_contiguous_is_taken(engine: Engine) -> None:
    x = pictures(3)

    turned = np.ascontiguousarray(x.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)

    assert not turned.flags.c_contiguous
    np.testing.assert_array_equal(engine.run(turned, 2), engine.run(x, 2))


def test_a_batch_of_another_type_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineError, match="input 'x' is float64; the model takes float32"):
        engine.run(pictures(1).astype(np.float64), 0)


def test_cuda_asked_for_and_missing_is_said(tiny_artifact: Artifact) -> None:
    with pytest.raises(EngineError, match="install onnxruntime-gpu"):
        Engine(tiny_artifact, provider="cuda")


@pytest.mark.parametrize(
    ("field", "tensor", "said"),
    [
        ("input", Tensor("image", "float32", (-1, 1, 8, 8)), "its input is 'x' .* says 'image'"),
        ("input", Tensor("x", "float32", (-1, 1, 8, 9)), r"input is 'x' .* says 'x' .*8, 9\]"),
        ("input", Tensor("x", "float32", (-1, 64)), "its input is"),
        ("output", Tensor("y", "float32", (-1, 7)), r"output is 'y' .* says 'y' \[-1, 7\]"),
    ],
)
def test_graphs_that_are_not_what_the_manifest_says_are_named(
    tmp_path: Path, field: str, tensor: Tensor, said: str
) -> None:
    changes: dict[str, Any] = {"labels": None, field: tensor}
    manifest = replace(tiny_manifest(), **changes)
    model = artifact.save(tmp_path / "odd.maestro", manifest, tiny_contents())

    with pytest.raises(EngineError, match=rf"points/00\.onnx: .*{said}"):
        Engine(model)


def test_a_graph_that_the_runtime_refuses_is_named(tiny_artifact: Artifact, tmp_path: Path) -> None:
    tiny_artifact.graph_path(1).write_bytes(b"not a graph")

    with pytest.raises(EngineError, match=r"points/01\.onnx: ONNX Runtime refuses it"):
        Engine(tiny_artifact)
    with pytest.raises(EngineError, match=r"tiny\.maestro: ONNX Runtime refuses it.*01\.onnx"):
        Engine(tiny_artifact, state_dir=tmp_path / "state")


def test_with_a_budget_a_point_is_loaded_when_used(tiny_artifact: Artifact, tmp_path: Path) -> None:
    engine = Engine(tiny_artifact, state_dir=tmp_path / "state", memory_budget_bytes=0)

    assert len(engine.resident) == 0
    engine.run(pictures(1), 3)
    assert list(engine.resident) == [3]
    engine.run(pictures(1), 1)
    assert list(engine.resident) == [1]


def test_baked_points_that_were_removed_are_baked_again(
    tiny_artifact: Artifact, tmp_path: Path
) -> None:
    engine = Engine(tiny_artifact, state_dir=tmp_path / "state", memory_budget_bytes=0)
    before = engine.run(pictures(1), 1)

    shutil.rmtree(tmp_path / "state" / "baked")

    assert np.array_equal(engine.run(pictures(1), 2), Engine(tiny_artifact).run(pictures(1), 2))
    assert np.array_equal(engine.run(pictures(1), 1), before)


def test_a_state_directory_that_cannot_be_written_is_noted(
    tiny_artifact: Artifact, tmp_path: Path
) -> None:
    blocked = tmp_path / "state"
    blocked.write_text("a file where the directory should be")

    engine = Engine(tiny_artifact, state_dir=blocked)

    assert engine.run(pictures(1), 0).shape == (1, 10)
    assert engine.note is not None
    assert "points not baked" in engine.note


def test_the_artifact_may_be_reached_by_another_path(tiny_artifact: Artifact) -> None:
    link = tiny_artifact.path.with_name("link.maestro")
    link.symlink_to(tiny_artifact.path)

    y = Engine(replace(tiny_artifact, path=link)).run(pictures(1), 0)

    assert y.shape == (1, 10)
