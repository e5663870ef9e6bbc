"""The README's commands, run as they stand."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from maestro_core import artifact
from server.settings import Settings, shipped_artifact
from tests.server_process import running_server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
PROGRAM = [sys.executable, "-c", "from maestro_core.cli import main; main()"]
CURLS = [command for command in COMMANDS if command.startswith("curl")]
SHIPPED = artifact.load(shipped_artifact())


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_server(tmp_path_factory.mktemp("state")) as address:
        yield address


def run(words: list[str], cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        words, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_there_is_something_to_run() -> None:
    assert COMMANDS[:2] == ["make serve", "make test"]
    assert len(CURLS) >= 4


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("command", CURLS)
def test_a_curl_line_gets_an_answer(address: str, command: str) -> None:
    words = [word.replace("localhost:8000", address) for word in shlex.split(command)]

    finished = run([*words, "--silent", "--show-error", "--fail-with-body"], ROOT)

    assert finished.returncode == 0, finished.stdout + finished.stderr
    answer = json.loads(finished.stdout)
    if picture := re.search(r"@examples/(\w+)\.png", command):
        assert answer["labels"] == [picture[1]]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_answer_that_is_shown_is_part_of_the_real_one(address: str) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    shown = json.loads(block)
    words = [word.replace("localhost:8000", address) for word in shlex.split(CURLS[0])]

    real = json.loads(run([*words, "--silent"], ROOT).stdout)

    assert shown.keys() < real.keys()
    assert shown["labels"] == real["labels"]
    score = SHIPPED.points[shown["point"]].score
    assert shown["accuracy"] == round(score.value, 4)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_a_make_line_has_its_target(command: str) -> None:
    finished = run([*shlex.split(command), "--dry-run"], ROOT)

    assert finished.returncode == 0, finished.stderr


def test_the_train_line_is_understood_as_far_as_its_data(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (line,) = (shlex.split(c) for c in COMMANDS if " train " in c)

    finished = run([*PROGRAM, *line[1:]], tmp_path)

    # tests/test_recipes.py trains; here the recipe and the options are known, and the file is not.
    assert finished.returncode == 1
    assert "mnist.npz: no such file" in finished.stderr


def test_the_show_line_shows_what_training_leaves(tmp_path: Path) -> None:
    (line,) = (shlex.split(c) for c in COMMANDS if " show " in c)
    shutil.copytree(SHIPPED.path, tmp_path / line[-1])

    finished = run([*PROGRAM, *line[1:]], tmp_path, MAESTRO_STATE_DIR=str(tmp_path))

    assert finished.returncode == 0, finished.stderr
    assert f"{100 * SHIPPED.points[-1].score.value:.2f}" in finished.stdout
    assert "…" not in finished.stdout


def test_the_table_of_points_is_that_of_the_shipped_network() -> None:
    dense_macs = SHIPPED.manifest.dense_macs
    measured = json.loads((ROOT / "benchmarks/results/cifar10-small.json").read_text())
    p50_ms = measured["latency"]["p50_ms"]["two threads"]
    row = r"^\| (\d+) \| ([\d.]+) % \| ([\d.]+)–([\d.]+) \| (\d+) % \| ([\d.]+) \| ([\d,]+) \|$"
    rows = re.findall(row, README, re.MULTILINE)

    assert len(rows) >= 3
    for number, *written in rows:
        point = SHIPPED.points[int(number)]
        score = point.score
        percents = [f"{100 * share:.2f}" for share in (score.value, score.low, score.high)]
        macs = f"{100 * point.macs / dense_macs:.0f}"
        latency = f"{p50_ms[f'point {number}'] / p50_ms['dense']:.2f}"
        assert written == [*percents, macs, latency, f"{point.params:,}"]


def test_every_setting_has_a_line_and_every_line_a_setting() -> None:
    named = set(re.findall(r"`MAESTRO_([A-Z_]+)`", README))

    assert named - {"ADMIN_TOKEN"} >= {field.upper() for field in Settings.model_fields} - {
        "ADMIN_TOKEN"
    }
    assert named <= {field.upper() for field in Settings.model_fields}


def test_it_stays_readable() -> None:
    assert len(README.splitlines()) <= 200


def test_the_files_that_it_links_to_exist() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
