import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from maestro_core import artifact
from maestro_core.artifact import Artifact, ArtifactError, Layer, Score
from tests.conftest import tiny_contents, tiny_manifest


def edit_manifest(path: Path, **fields: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | fields))


def test_an_artifact_reads_back_as_written(tiny_artifact: Artifact) -> None:
    again = artifact.load(tiny_artifact.path)

    assert again == tiny_artifact
    assert again.manifest == replace(tiny_manifest(), files=again.manifest.files)


def test_the_manifest_has_the_documented_fields(tiny_artifact: Artifact) -> None:
    manifest = json.loads((tiny_artifact.path / "manifest.json").read_text())

    assert list(manifest) == [
        *("format", "name", "version", "task", "input", "output", "labels", "metric"),
        *("dense_macs", "dense_params", "layers", "points", "files", "provenance"),
    ]
    assert manifest["layers"][1] == {
        "name": "fc",
        "kind": "linear",
        "in": 384,
        "out": 10,
        "kernel": [],
        "stride": [],
        "padding": [],
        "dilation": [],
        "positions": 1,
        "max_rank": 10,
    }
    assert manifest["points"][2] == {
        "ranks": [2, 5],
        "precision": "fp32",
        "score": {"value": 0.7, "low": 0.68, "high": 0.72},
        "macs": 3890,
        "params": 2016,
        "graph": "points/02.onnx",
    }


@pytest.mark.parametrize(("rank", "params"), [(0, 0), (1, 15), (3, 45), (4, 54), (6, 54)])
def test_a_layer_costs_the_cheaper_of_factors_and_dense(rank: int, params: int) -> None:
    layer = Layer("conv", "conv2d", 1, 6, (3, 3), (1, 1), (1, 1), (1, 1), 64, 6)

    assert layer.params(rank) == params == min(rank * (6 + 9), 6 * 9)
    assert layer.macs(rank) == 64 * params
    assert layer.is_dense(rank) == (rank in (4, 6))


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_of_a_share_is_the_published_one(
    correct: int, n: int, low: float, high: float
) -> None:
    score = Score.of_share(correct, n)

    assert score.value == correct / n
    assert (round(score.low, 4), round(score.high, 4)) == (low, high)


@pytest.mark.parametrize("n", [10, 150, 10_000])
def test_a_share_is_within_its_interval_where_none_or_all_are_right(n: int) -> None:
    for correct in (0, n):
        score = Score.of_share(correct, n)

        assert 0 <= score.low <= score.value <= score.high <= 1


def test_a_missing_file_is_named(tiny_artifact: Artifact) -> None:
    (tiny_artifact.path / "points/02.onnx").unlink()

    with pytest.raises(ArtifactError, match=r"points/02\.onnx: No such file"):
        artifact.load(tiny_artifact.path)


def test_a_wrong_digest_is_named(tiny_artifact: Artifact) -> None:
    weights = tiny_artifact.weights_path
    data = bytearray(weights.read_bytes())
    data[0] ^= 1
    weights.write_bytes(data)

    with pytest.raises(ArtifactError, match=r"weights\.bin: its SHA-256"):
        artifact.load(tiny_artifact.path)


def test_truncated_weights_are_named(tiny_artifact: Artifact) -> None:
    os.truncate(tiny_artifact.weights_path, 100)

    with pytest.raises(ArtifactError, match=r"weights\.bin: 100 bytes, but the manifest says"):
        artifact.load(tiny_artifact.path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "points/../../secret", "a\\..\\b"])
def test_a_path_out_of_the_directory_is_refused(tiny_artifact: Artifact, name: str) -> None:
    files = {name: {"size": 1, "sha256": "00"}}
    manifest = json.loads((tiny_artifact.path / "manifest.json").read_text())
    edit_manifest(tiny_artifact.path, files=manifest["files"] | files)

    with pytest.raises(ArtifactError, match="leaves the artifact"):
        artifact.load(tiny_artifact.path)


def test_a_link_out_of_the_directory_is_refused(tiny_artifact: Artifact, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    weights = tiny_artifact.weights_path
    weights.rename(outside)
    weights.symlink_to(outside)

    with pytest.raises(ArtifactError, match=r"weights\.bin' leaves the artifact"):
        artifact.load(tiny_artifact.path)


@pytest.mark.parametrize("number", [2, 0, "1", None])
def test_an_unknown_format_is_refused_by_number(tiny_artifact: Artifact, number: object) -> None:
    edit_manifest(tiny_artifact.path, format=number)

    with pytest.raises(ArtifactError, match=r"manifest\.json: format .* is unknown; .* reads 1"):
        artifact.load(tiny_artifact.path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSON: Invalid JSON"),
        ("[]", "JSON: "),
        ('{"format": 1}', "name: Field required"),
        ("\udc80", "JSON: Invalid JSON"),
    ],
)
def test_a_broken_manifest_is_refused(tiny_artifact: Artifact, text: str, message: str) -> None:
    path = tiny_artifact.path / "manifest.json"
    path.write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(ArtifactError, match=message):
        artifact.load(tiny_artifact.path)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([7, 10], r"points\.4\.ranks: layer 'conv' has ranks 0\.\.6, not 7"),
        ([6], r"points\.4\.ranks: 1 ranks for 2 layers"),
        ([6, -1], r"points\.4\.ranks\.1: "),
        ([6, 2], r"points\.4\.ranks: layer 'fc' falls below points\.3"),
    ],
)
def test_wrong_ranks_are_named(tiny_artifact: Artifact, ranks: list[int], message: str) -> None:
    points = json.loads((tiny_artifact.path / "manifest.json").read_text())["points"]
    points[4]["ranks"] = ranks
    edit_manifest(tiny_artifact.path, points=points)

    with pytest.raises(ArtifactError, match=message):
        artifact.load(tiny_artifact.path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("labels", list("012345678"), r"labels: 9 for an output of shape \[-1, 10\]"),
        ("labels", [], r"labels: 0 for an output of shape \[-1, 10\]"),
        ("output.shape", [-1, 10, 4], r"labels: 10 for an output of shape \[-1, 10, 4\]"),
        ("output.shape", [], r"output\.shape: \[\]; it must be -1"),
        ("input.shape", [3, 1, 8, 8], r"input\.shape: \[3, 1, 8, 8\]; it must be -1 for the batch"),
        ("input.shape", [-1, 1, 0, 8], r"input\.shape: .*sizes of 1 or more"),
        ("input.shape", [-1, 1, -1, 8], r"input\.shape: .*sizes of 1 or more"),
        ("input.shape", [-1, 3, 8, 8], r"input\.shape: .* but input\.image is 1×8×8"),
        ("input.shape", [-1, 64], r"input\.shape: .* but input\.image is 1×8×8"),
        ("input.image.mean", [0.5, 0.5], r"input\.image: .*mean: .*L takes 1 finite numbers"),
        ("input.image.std", [], r"input\.image: .*std: \[\]; L takes 1 finite numbers"),
        ("input.image.std", [float("nan")], r"input\.image: .*std: .*takes 1 finite"),
        ("input.image.std", [0.0], r"input\.image: .*std: \[0\.0\]; it must be above 0"),
        ("metric.higher_is_better", False, r"metric\.higher_is_better: false; format 1 serves"),
        ("points.4.score.high", 7.0, r"points\.4\.score: 0\.9 in 0\.88\.\.7\.0; it must be within"),
        ("points.4.score.value", 7.0, r"points\.4\.score: 7\.0 in .*; it must be within 0\.\.1"),
        ("points.4.score.value", float("nan"), r"points\.4\.score: nan in "),
        ("points.0.score.low", -0.1, r"points\.0\.score: 0\.5 in -0\.1\.\."),
        ("points.0.score.low", 0.51, r"points\.0\.score: 0\.5 in 0\.51\.\..*in its interval"),
    ],
)
def test_what_could_not_be_served_is_named(
    tiny_artifact: Artifact, field: str, value: object, message: str
) -> None:
    manifest = json.loads((tiny_artifact.path / "manifest.json").read_text())
    *parents, name = field.split(".")
    part = manifest
    for parent in parents:
        part = part[int(parent) if parent.isdigit() else parent]
    part[name] = value
    edit_manifest(tiny_artifact.path, **manifest)

    with pytest.raises(ArtifactError, match=rf"manifest\.json: {message}"):
        artifact.load(tiny_artifact.path)


def test_what_could_not_be_served_is_not_written(tmp_path: Path) -> None:
    manifest = replace(tiny_manifest(), labels=("one", "two"))

    with pytest.raises(ArtifactError, match="labels: 2 for an output"):
        artifact.save(tmp_path / "tiny.maestro", manifest, tiny_contents())

    assert list(tmp_path.iterdir()) == []


def test_an_interval_that_ends_a_rounding_from_its_share_is_read(tiny_artifact: Artifact) -> None:
    points = json.loads((tiny_artifact.path / "manifest.json").read_text())["points"]
    points[4]["score"] = {"value": 1.0, "low": 0.72, "high": 0.9999999999999999}
    edit_manifest(tiny_artifact.path, points=points)

    assert artifact.load(tiny_artifact.path).points[4].score.value == 1.0


def test_a_frame_that_is_smaller_than_the_input_is_named(tiny_artifact: Artifact) -> None:
    tensor = json.loads((tiny_artifact.path / "manifest.json").read_text())["input"]
    tensor["image"]["shorter"] = 7
    edit_manifest(tiny_artifact.path, input=tensor)

    with pytest.raises(ArtifactError, match=r"input\.image: .*shorter: 7 leaves less than 8×8"):
        artifact.load(tiny_artifact.path)


def test_no_directory_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such artifact directory"):
        artifact.load(tmp_path / "none.maestro")


def test_saving_replaces_an_artifact_as_a_whole(tiny_artifact: Artifact) -> None:
    contents = tiny_contents() | {"notes.txt": b"second"}

    saved = artifact.save(tiny_artifact.path, replace(tiny_manifest(), version="2"), contents)

    assert saved.manifest.version == "2"
    assert [p.name for p in tiny_artifact.path.parent.iterdir()] == ["tiny.maestro"]


def test_an_interrupted_write_leaves_the_old_artifact(
    tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(ArtifactError, match="cannot be written: No space left on device"):
        artifact.save(tiny_artifact.path, replace(tiny_manifest(), version="2"), tiny_contents())

    assert artifact.load(tiny_artifact.path).manifest.version == "1"
    assert [p.name for p in tiny_artifact.path.parent.iterdir()] == ["tiny.maestro"]


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(ArtifactError, match=r"tiny\.maestro: cannot be written"):
        artifact.save(tmp_path / "file" / "tiny.maestro", tiny_manifest(), tiny_contents())


def test_copies_and_directories_are_on_the_disk_before_the_artifact_is_seen(
    tiny_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    contents = {name: tiny_artifact.path / name for name in tiny_artifact.manifest.files}

    saved = artifact.save(tmp_path / "again.maestro", tiny_manifest(), contents)

    written = [saved.path, *saved.path.rglob("*")]
    assert [path for path in written if path.stat().st_ino not in flushed] == []


def test_a_file_to_copy_that_is_not_there_is_named(tmp_path: Path) -> None:
    contents: dict[str, bytes | Path] = {**tiny_contents(), "eval.npz": tmp_path / "none.npz"}

    with pytest.raises(ArtifactError, match=r"none\.npz: No such file"):
        artifact.save(tmp_path / "tiny.maestro", tiny_manifest(), contents)
