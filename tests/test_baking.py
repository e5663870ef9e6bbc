"""Baked points: one copy of what they share, and made again when the key or a byte differs."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from maestro_core.artifact import Artifact
from server.baking import Baked, BakeError, bake
from server.engine import Engine, session_options


def baked(artifact: Artifact, directory: Path, key: str = "this host") -> Baked:
    graphs = [artifact.graph_path(point) for point in range(len(artifact.points))]
    return bake(graphs, directory, key, lambda: session_options(1))


def stamp(directory: Path) -> int:
    return (directory / "baked.json").stat().st_ino


def rewrite(directory: Path, without: str | None = None, **changes: object) -> None:
    """Change what the index of a directory says; with a name, remove that file."""
    if without:
        (directory / without).unlink()
    index = json.loads((directory / "baked.json").read_text())
    (directory / "baked.json").write_text(json.dumps(index | changes))


def only_weights(directory: Path) -> dict[str, str]:
    weights = (directory / "weights.bin").read_bytes()
    return {"weights.bin": hashlib.sha256(weights).hexdigest()}


def test_points_share_what_they_have_in_common(small_resnet: Artifact, tmp_path: Path) -> None:
    points = baked(small_resnet, tmp_path / "baked")

    together = points.mapped_bytes(range(3))
    alone = [points.mapped_bytes([point]) for point in range(3)]
    assert max(alone) < together < 0.8 * sum(alone)
    assert (points.path / "weights.bin").stat().st_size < together + 2**20


def test_baked_points_compute_what_the_artifact_does(
    small_resnet: Artifact, tmp_path: Path
) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    plain, shared = Engine(small_resnet), Engine(small_resnet, state_dir=tmp_path)

    for point in range(3):
        np.testing.assert_array_equal(shared.run(x, point), plain.run(x, point))


def test_what_is_baked_is_used_again(tiny_artifact: Artifact, tmp_path: Path) -> None:
    first = baked(tiny_artifact, tmp_path / "baked")
    made = stamp(first.path)

    assert baked(tiny_artifact, tmp_path / "baked") == first
    assert stamp(first.path) == made


@pytest.mark.skipif(sys.platform != "linux", reason="no other system has posix_fadvise")
def test_weights_are_read_into_single_pages(
    tiny_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "server.baking.os.posix_fadvise",
        lambda fd, _offset, _length, advice: told.append(
            (Path(f"/proc/self/fd/{fd}").readlink().name, advice)
        ),
    )

    baked(tiny_artifact, tmp_path / "baked")
    made = [advice for name, advice in told if name == "weights.bin"]
    assert made[:2] == [os.POSIX_FADV_DONTNEED, os.POSIX_FADV_RANDOM]

    told.clear()
    baked(tiny_artifact, tmp_path / "baked")
    assert ("weights.bin", os.POSIX_FADV_RANDOM) in told


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: (path / "weights.bin").write_bytes(b"short"),
        lambda path: (path / "00.onnx").unlink(),
        lambda path: (path / "baked.json").write_text("{"),
        lambda path: (path / "baked.json").write_text('{"key": "this host", "pages": 7}'),
        lambda path: rewrite(path, files={}, without="weights.bin"),
        lambda path: rewrite(path, files=only_weights(path), without="00.onnx"),
        lambda path: rewrite(path, plain_bytes=-1),
        lambda path: rewrite(path, plain_bytes=float("inf")),
        lambda path: rewrite(path, plain_bytes=(path / "weights.bin").stat().st_size + 1),
    ],
)
def test_what_is_damaged_is_baked_again(
    tiny_artifact: Artifact, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    first = baked(tiny_artifact, tmp_path / "baked")
    spoil(first.path)

    again = baked(tiny_artifact, tmp_path / "baked")

    assert again == first
    assert ort.InferenceSession(again.graph_path(0), providers=["CPUExecutionProvider"])


def test_another_key_bakes_again(tiny_artifact: Artifact, tmp_path: Path) -> None:
    made = stamp(baked(tiny_artifact, tmp_path / "baked").path)

    again = baked(tiny_artifact, tmp_path / "baked", key="another host")

    assert stamp(again.path) != made
    assert [path.name for path in tmp_path.glob(".baked*")] == []


def test_old_directories_give_way(tiny_artifact: Artifact, tmp_path: Path) -> None:
    for i in range(6):
        baked(tiny_artifact, tmp_path / "baked" / str(i))
        baked(tiny_artifact, tmp_path / "baked" / "0")  # in use all the time

    assert sorted(path.name for path in (tmp_path / "baked").iterdir()) == ["0", "3", "4", "5"]


def test_a_directory_that_cannot_be_written_is_said(
    tiny_artifact: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(BakeError, match="points not baked"):
        baked(tiny_artifact, tmp_path / "file" / "baked")


def test_a_disk_that_is_full_is_no_obstacle(tiny_artifact: Artifact, tmp_path: Path) -> None:
    """A limit on the size of files makes writing fail as a full disk does."""
    program = f"""
import resource, signal
from pathlib import Path
import numpy as np
from maestro_core import artifact
from server.engine import Engine
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = artifact.load(Path({str(tiny_artifact.path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
engine = Engine(model, state_dir=Path({str(tmp_path)!r}))
assert "points not baked: File too large;" in engine.note, engine.note
engine.run(np.zeros((1, 1, 8, 8), np.float32), 0)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert ran.returncode == 0, ran.stderr


def test_two_processes_that_bake_at_once_both_get_the_points(
    tiny_artifact: Artifact, tmp_path: Path
) -> None:
    def options() -> ort.SessionOptions:
        """Bake the same elsewhere, in the middle of baking it here."""
        if not (tmp_path / "baked").exists():
            baked(tiny_artifact, tmp_path / "baked")
        return session_options(1)

    graphs = [tiny_artifact.graph_path(point) for point in range(5)]
    found = bake(graphs, tmp_path / "baked", "this host", options)

    assert found == baked(tiny_artifact, tmp_path / "baked")
    assert [path.name for path in tmp_path.glob(".baked*")] == []
