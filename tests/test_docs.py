"""The guides' commands and programs, run as they stand on a model that takes a second."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maestro_core import artifact
from maestro_core.artifact import Artifact
from server.metrics import Metrics
from tests.conftest import tiny_contents, tiny_manifest
from tests.server_process import running_server

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PROGRAM = [sys.executable, "-c", "from maestro_core.cli import main; main()"]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def commands(first: str) -> list[tuple[str, str]]:
    """Return (file, line) of the commands that begin with a word."""
    return [
        (path.name, line)
        for path in (*DOCS, ROOT / "benchmarks" / "README.md")
        for block in blocks(path, "sh")
        for line in block.splitlines()
        if line.split()[:1] == [first]
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the guides name: a model, a picture, a data set."""
    root = tmp_path_factory.mktemp("docs")
    artifact.save(root / "out" / "model.maestro", tiny_manifest(), tiny_contents())
    Image.new("L", (8, 8), 200).save(root / "picture.png")
    rng = np.random.default_rng(0)
    y_train, y_test = rng.integers(0, 3, 500), rng.integers(0, 3, 200)
    np.savez(
        root / "bars.npz",
        x_train=bars(y_train),
        y_train=y_train,
        x_test=bars(y_test),
        y_test=y_test,
    )
    return root


def bars(
    labels: "np.ndarray[tuple[int], np.dtype[np.int64]]",
) -> "np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]":
    """Return pictures whose third of that number is bright."""
    pixels = np.random.default_rng(1).integers(0, 100, (len(labels), 8, 8)).astype(np.uint8)
    for picture, label in zip(pixels, labels, strict=True):
        picture[1 + 2 * label : 3 + 2 * label] += 120
    return pixels


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"MAESTRO_STATE_DIR": str(folder / "state"), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with running_server(folder / "served", folder / "out" / "model.maestro") as address:
        yield address


def test_the_guides_have_what_they_are_for() -> None:
    assert {"your-network.md", "serving.md", "artifact.md", "scheduling.md"} <= {
        path.name for path in DOCS
    }
    assert len(commands("curl")) >= 4


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_line_of_a_guide_is_of_a_kind_that_is_tried(path: Path) -> None:
    lines = [line for block in blocks(path, "sh") for line in block.splitlines()]

    assert {line.split()[0] for line in lines} <= {"curl", "maestro", "docker"}


def test_the_docker_lines_run_what_they_built_as_the_image_is_made() -> None:
    build, run = (shlex.split(line) for _, line in commands("docker"))
    recipe = (ROOT / "Dockerfile").read_text()

    assert run[-1] == build[build.index("-t") + 1]
    assert f"VOLUME {run[run.index('-v') + 1].partition(':')[2]}\n" in recipe
    assert f"EXPOSE {run[run.index('-p') + 1].partition(':')[2]}\n" in recipe


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(("file", "line"), commands("curl"))
def test_a_curl_line_gets_an_answer(folder: Path, address: str, file: str, line: str) -> None:
    words = [word.replace("localhost:8000", address) for word in shlex.split(line)]

    finished = subprocess.run(
        [*words, "--silent", "--show-error", "--fail-with-body"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )

    assert finished.returncode == 0, (file, finished.stdout, finished.stderr)


@pytest.mark.parametrize(("file", "line"), commands("maestro"))
def test_a_command_of_the_program_has_these_options(file: str, line: str) -> None:
    words = shlex.split(line)[1:]
    named = words[:2] if words[0] == "bench" else words[:1]
    shown = subprocess.run(
        [*PROGRAM, *named, "--help"], capture_output=True, text=True, check=False
    )

    assert shown.returncode == 0, (file, line)
    for option in (word for word in words if word.startswith("--")):
        assert option in shown.stdout, (file, line)


@pytest.mark.parametrize("path", [ROOT / "docs" / n for n in ("serving.md", "artifact.md")])
def test_a_short_program_runs(folder: Path, address: str, path: Path) -> None:
    (program,) = blocks(path, "python")
    program = program.replace("http://localhost:8000", address)

    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )

    assert finished.returncode == 0, finished.stderr
    assert finished.stdout


def test_a_network_of_ones_own_becomes_an_artifact_that_has_learnt(folder: Path) -> None:
    pytest.importorskip("torch")
    (program,) = blocks(ROOT / "docs" / "your-network.md", "python")

    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )

    assert finished.returncode == 0, finished.stderr
    assert "out/bars.maestro" in finished.stdout
    made: Artifact = artifact.load(folder / "out" / "bars.maestro")
    assert made.points[-1].score.value > 0.9
    assert made.points[0].macs < 0.5 * made.manifest.dense_macs, "nothing was cut"


def test_every_metric_and_no_other_is_in_the_guide_for_operators() -> None:
    named = set(re.findall(r"`(maestro_\w+)`", (ROOT / "docs" / "operations.md").read_text()))
    text = Metrics().text().decode()
    exported = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}

    # Of a histogram the sum is named too; the library adds when each series began.
    assert {name.removesuffix("_sum") for name in named} == {
        name for name in exported if not name.endswith("_created")
    }


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_what_a_guide_links_to_exists(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
    for target in re.findall(
        r"`((?:deploy|maestro_core|server|benchmarks)/[\w./-]+)`", path.read_text()
    ):
        assert (ROOT / target).exists(), target
