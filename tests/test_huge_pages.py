"""Weights in huge pages: computed with where they lie, the same answers, and when they are used."""

import errno
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from maestro_core.artifact import Artifact
from server import huge_pages
from server.baking import Baked
from server.engine import Engine, session_options
from server.huge_pages import HugePages, When, are_worth_it
from tests.test_baking import baked

pytestmark = pytest.mark.skipif(
    not huge_pages._ENABLED.exists(), reason="no kernel with transparent huge pages"
)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return what a kernel says that gives huge pages to who asks."""
    said = tmp_path / "enabled"
    said.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_ENABLED", said)
    return said


def pictures(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, 3, 32, 32)).astype(np.float32)


def session(points: Baked, point: int, huge: HugePages) -> ort.InferenceSession:
    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    huge.give(points.plain(point), options)
    return ort.InferenceSession(
        points.graph_path(point), options, providers=["CPUExecutionProvider"]
    )


def test_a_session_computes_with_the_copy(small_resnet: Artifact, tmp_path: Path) -> None:
    points = baked(small_resnet, tmp_path / "baked")
    true = HugePages(points.weights_path, points.plain_bytes)
    (tmp_path / "zeros").write_bytes(bytes(points.plain_bytes))
    zeros = HugePages(tmp_path / "zeros", points.plain_bytes)

    (y,) = session(points, 1, true).run(None, {"x": pictures(1)})
    (without_weights,) = session(points, 1, zeros).run(None, {"x": pictures(1)})

    np.testing.assert_array_equal(y, Engine(small_resnet).run(pictures(1), 1))
    assert np.ptp(without_weights) == 0 != np.ptp(y)


def test_points_share_one_address(small_resnet: Artifact, tmp_path: Path) -> None:
    points = baked(small_resnet, tmp_path / "baked")

    spans = [{(w.offset, w.shape) for w in points.plain(point)} for point in range(3)]
    offsets = [{offset for offset, _ in span} for span in spans]

    assert offsets[0] & offsets[1] & offsets[2]
    ends = [at + 4 * int(np.prod(shape)) for span in spans for at, shape in span]
    assert max(ends) == points.plain_bytes


@pytest.mark.usefixtures("kernel")
def test_an_engine_with_huge_pages_answers_alike(small_resnet: Artifact, tmp_path: Path) -> None:
    mapped = Engine(small_resnet, state_dir=tmp_path / "state", huge_pages="never")
    huge = Engine(small_resnet, state_dir=tmp_path / "state", huge_pages="always")

    assert (mapped.has_huge_pages, huge.has_huge_pages) == (False, True)
    for point in range(3):
        np.testing.assert_array_equal(huge.run(pictures(2), point), mapped.run(pictures(2), point))
    assert huge.profile_key(1) != mapped.profile_key(1)


@pytest.mark.parametrize(
    ("said", "when", "budget_bytes", "used"),
    [
        ("always [madvise] never", "auto", None, True),
        ("[always] madvise never", "auto", None, True),
        ("always [madvise] never", "never", None, False),
        ("always madvise [never]", "always", None, False),
        (None, "always", None, False),
        ("always [madvise] never", "always", 2**30, False),
    ],
)
def test_when_they_are_used(
    small_resnet: Artifact,
    tmp_path: Path,
    kernel: Path,
    said: str | None,
    when: When,
    budget_bytes: int | None,
    used: bool,
) -> None:
    kernel.write_text(said) if said else kernel.unlink()

    engine = Engine(
        small_resnet,
        state_dir=tmp_path / "state",
        memory_budget_bytes=budget_bytes,
        huge_pages=when,
    )

    assert engine.has_huge_pages is used


@pytest.mark.usefixtures("kernel")
def test_points_that_are_not_baked_have_none(small_resnet: Artifact) -> None:
    assert not Engine(small_resnet, huge_pages="always").has_huge_pages


def test_points_that_share_little_or_are_small_are_not_worth_it(
    tiny_artifact: Artifact, tmp_path: Path
) -> None:
    points = (((0, 8 * 2**20),), ((0, 9 * 2**20),))

    assert are_worth_it(Baked(tmp_path, points, plain_bytes=18 * 2**20))
    assert not are_worth_it(Baked(tmp_path, points, plain_bytes=19 * 2**20))
    assert not are_worth_it(baked(tiny_artifact, tmp_path / "baked"))


def test_a_file_that_ends_too_soon_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"short")

    with pytest.raises(OSError, match="it ends before byte 6"):
        HugePages(tmp_path / "weights.bin", 6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("when", ["auto", "always"])
def test_without_memory_for_a_copy_weights_are_mapped_and_that_is_noted(
    small_resnet: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: When
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("server.huge_pages.mmap.mmap", none_left)
    engine = Engine(small_resnet, state_dir=tmp_path / "state", huge_pages=when)

    assert not engine.has_huge_pages
    assert engine.note == "weights are mapped, not in huge pages: Cannot allocate memory"
    assert engine.run(pictures(1), 0).shape == (1, 10)
