"""Samples and error tables of an artifact: read as written, refused by name when wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from maestro_core import artifact, held_out
from maestro_core.artifact import Artifact, ArtifactError
from maestro_core.frontier import RankTable
from maestro_core.held_out import ErrorTable
from tests.conftest import tiny_contents, tiny_manifest

X = np.random.default_rng(0).standard_normal((12, 1, 8, 8)).astype(np.float32)
LABELS = np.arange(12) % 10
TABLES = (
    RankTable((1, 6), (1.0, 6.0), (2.0, 1.0)),
    RankTable((2, 9, 10), (2.0, 9.0, 10.0), (1.5, 1.2, 1.0)),
)


def extras() -> dict[str, bytes]:
    return held_out.contents(X, LABELS, ("conv", "fc"), TABLES)


def save(path: Path, extra: dict[str, bytes]) -> Artifact:
    return artifact.save(path / "tiny.maestro", tiny_manifest(), {**tiny_contents(), **extra})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    saved = save(tmp_path, extras())

    samples = held_out.read_samples(saved)
    assert held_out.is_searchable(saved)
    assert np.array_equal(samples.x, X)
    assert np.array_equal(samples.labels, LABELS)
    assert held_out.read_tables(saved) == [ErrorTable(t.ranks, t.errors) for t in TABLES]


def test_the_same_samples_are_the_same_bytes() -> None:
    assert extras() == extras()


def test_an_artifact_without_them_says_what_to_do(tiny_artifact: Artifact) -> None:
    assert not held_out.is_searchable(tiny_artifact)
    with pytest.raises(ArtifactError, match=r"has no eval\.npz.*export again"):
        held_out.read_samples(tiny_artifact)
    with pytest.raises(ArtifactError, match=r"has no errors\.json.*export again"):
        held_out.read_tables(tiny_artifact)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"ranks": [1, 5], "errors": [2, 1]}, "ranks must end at 6, not be 1..5"),
        ({"ranks": [6, 1], "errors": [2, 1]}, "ranks must rise"),
        ({"ranks": [1, 6], "errors": [2]}, "1 errors"),
        ({"ranks": [1, 6]}, "'errors'"),
        ({"ranks": ["a"], "errors": [1]}, "'a'"),
    ],
)
def test_a_table_that_does_not_fit_names_its_layer(
    tmp_path: Path, entry: object, message: str
) -> None:
    tables = {**json.loads(extras()[held_out.ERRORS]), "conv": entry}
    saved = save(tmp_path, {**extras(), held_out.ERRORS: json.dumps(tables).encode()})

    with pytest.raises(ArtifactError, match=rf"errors\.json: layer 'conv': .*{message}"):
        held_out.read_tables(saved)


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (X.astype(np.float64), LABELS, "x is float64"),
        (X[:, :, :4], LABELS, r"x is float32 \[12, 1, 4, 8\]; it must be float32 \['n', 1, 8, 8\]"),
        (X, LABELS[:3], r"labels is int64 \[3\]; it must be integers \[12\]"),
        (X, LABELS.astype(np.float32), "labels is float32"),
    ],
)
def test_samples_that_do_not_fit_are_refused(
    tmp_path: Path, x: np.ndarray, labels: np.ndarray, message: str
) -> None:
    wrong = held_out.contents(x, labels, ("conv", "fc"), TABLES)
    saved = save(tmp_path, wrong)

    with pytest.raises(ArtifactError, match=rf"eval\.npz: {message}"):
        held_out.read_samples(saved)


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path, {**extras(), held_out.EVAL: b"PK\x03\x04 nothing"})

    with pytest.raises(ArtifactError, match=r"eval\.npz: not samples"):
        held_out.read_samples(saved)
