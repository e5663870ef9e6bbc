"""The program `maestro`, run as a user runs it."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from maestro_core import artifact, cli, terminal
from maestro_core.artifact import Artifact
from server.settings import Settings
from tests.conftest import tiny_contents, tiny_manifest


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"MAESTRO_STATE_DIR": str(tmp_path / "state"), "COLUMNS": "100"}


def maestro(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from maestro_core.cli import main; main()", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def check_error(finished: "subprocess.CompletedProcess[str]", text: str) -> None:
    assert finished.returncode != 0
    assert any(text in line for line in finished.stderr.splitlines())
    assert "Traceback" not in finished.stderr


def test_profile_then_show_then_infer(
    environment: dict[str, str], tiny_artifact: Artifact, tmp_path: Path
) -> None:
    path = str(tiny_artifact.path)
    before = json.loads(maestro(environment, "show", path, "--json").stdout)
    assert [row["p50_ms"] for row in before["points"]] == [None] * 5

    profiled = maestro(environment, "profile", path, "--quick", "--json")
    assert profiled.returncode == 0, profiled.stderr
    said = " ".join(profiled.stderr.split())
    assert re.search(
        r"measured until .*: within \d+\.\d% or less \(95 %\); others used \d+% ", said
    )
    shown = json.loads(maestro(environment, "show", path, "--json").stdout)
    assert shown == json.loads(profiled.stdout)
    assert all(row["p50_ms"] > 0 for row in shown["points"])

    np.save(tmp_path / "x.npy", np.zeros((1, 8, 8), np.float32))
    inferred = maestro(
        environment, "infer", path, str(tmp_path / "x.npy"), "--max-latency-ms", "1000", "--json"
    )
    assert json.loads(inferred.stdout)["point"] == 4


def test_nothing_reports_its_use_to_others(
    environment: dict[str, str], tiny_artifact: Artifact, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    unset = {"ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_DATA_HOME"}
    bare = {name: value for name, value in environment.items() if name not in unset}

    profiled = maestro(bare | {"HOME": str(home)}, "profile", str(tiny_artifact.path), "--quick")

    assert profiled.returncode == 0, profiled.stderr
    # onnxruntime makes an identifier of the device there before it reports.
    assert [path.name for path in home.rglob("*onnxruntime*")] == []


def test_show_prints_a_table_and_draws(
    environment: dict[str, str], tiny_artifact: Artifact, tmp_path: Path
) -> None:
    plot = tmp_path / "points.png"

    shown = maestro(environment, "show", str(tiny_artifact.path), "--plot", str(plot))

    assert shown.returncode == 0, shown.stderr
    assert "7.30 k" in shown.stdout
    assert "not profiled on this host yet" in shown.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_table_of_the_widest_scores_fits_a_terminal(
    environment: dict[str, str], tmp_path: Path
) -> None:
    manifest = tiny_manifest()
    right = replace(manifest.points[0], score=artifact.Score(1.0, 0.98, 1.0))
    points = (right, *manifest.points[1:])
    path = tmp_path / "right.maestro"
    artifact.save(path, replace(manifest, points=points), tiny_contents())

    shown = maestro(environment | {"COLUMNS": "80"}, "show", str(path)).stdout

    assert "100.00   98.00-100.00" in shown
    assert "p95 ms   front" in shown


def test_infer_calibrates_a_host_that_is_new(
    environment: dict[str, str], tiny_artifact: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"inputs": [[[0.0] * 8] * 8]}))

    inferred = maestro(environment, "infer", str(tiny_artifact.path), str(tmp_path / "x.json"))

    assert inferred.returncode == 0, inferred.stderr
    assert "calibrating" in inferred.stderr
    assert "point: 4" in inferred.stdout


def test_wrong_calls_get_one_line(
    environment: dict[str, str], tiny_artifact: Artifact, tmp_path: Path
) -> None:
    path = str(tiny_artifact.path)
    (tmp_path / "x.txt").write_text("7")
    (tmp_path / "x.png").write_bytes(b"7")
    (tmp_path / "x.json").write_text(json.dumps({"inputs": [[[0.0] * 8] * 8], "point": 1}))

    check_error(maestro(environment, "show", str(tmp_path)), "manifest.json: No such file")
    check_error(maestro(environment, "show", "none.maestro"), "no such artifact directory")
    long = "n" * 200 + ".maestro"
    check_error(maestro(environment, "show", long), f"{long}: no such artifact directory")
    check_error(maestro(environment, "infer", path, "none.png"), "No such file")
    check_error(maestro(environment, "infer", path, str(tmp_path / "x.txt")), "give a .png")
    check_error(maestro(environment, "infer", path, str(tmp_path / "x.png")), "neither a PNG")
    check_error(maestro(environment, "infer", path, str(tmp_path / "x.json")), "x.json: has point")
    png = min((Path(__file__).parents[1] / "examples").glob("*.png"))
    target = maestro(environment, "infer", path, str(png), "--max-latency-ms", "-1")
    check_error(target, "max_latency_ms: Input should be greater than 0")
    check_error(maestro(environment, "serve", str(tmp_path)), "manifest.json: No such file")
    odd = environment | {"MAESTRO_PORT": "many"}
    check_error(maestro(odd, "serve", path), "MAESTRO_PORT: Input should be a valid integer")


def test_paths_and_addresses_are_printed_as_they_are(
    environment: dict[str, str],
    tiny_artifact: Artifact,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    moved = tmp_path / "[v1] :key: of many words and more words" / "tiny.maestro"
    moved.parent.mkdir()
    tiny_artifact.path.rename(moved)

    shown = maestro(environment | {"COLUMNS": "40"}, "show", str(moved))
    terminal.tell("tiny on http://[fd00::5]:8000")

    assert f"not profiled on this host yet: maestro profile {moved}\n" in shown.stderr
    assert capsys.readouterr().out == "tiny on http://[fd00::5]:8000\n"


def test_what_serve_takes_names_the_setting_that_it_stands_for(environment: dict[str, str]) -> None:
    shown = maestro(environment, "serve", "--help").stdout

    for setting in ("ARTIFACT", "HOST", "PORT", "WORKERS", "POLICY"):
        assert f"MAESTRO_{setting}" in shown


def test_it_says_its_version(environment: dict[str, str]) -> None:
    assert maestro(environment, "--version").stdout.strip() == version("maestro-serve")


@pytest.mark.parametrize("options", [(), ("--help",), ("--list",)])
def test_bench_lists_what_it_compares(
    environment: dict[str, str], options: tuple[str, ...]
) -> None:
    listed = maestro(environment | {"COLUMNS": "40"}, "bench", *options)

    assert listed.returncode == 0, listed.stderr
    assert [line.partition(": ")[0] for line in listed.stdout.splitlines()] == [*cli.BENCHES]


def test_train_names_what_is_missing(environment: dict[str, str], tmp_path: Path) -> None:
    listed = maestro(environment, "train", "--list")
    assert listed.stdout.startswith("mnist-lenet: ")
    assert "\nimagenet-resnet50: " in listed.stdout
    assert "\nimagenet-resnet50-partial: " in listed.stdout

    check_error(maestro(environment, "train"), "give a RECIPE and --data PATH")
    data = ("--data", str(tmp_path / "none.npz"), "--out", str(tmp_path / "out"))
    check_error(maestro(environment, "train", "mnist", *data), "mnist-lenet")
    check_error(maestro(environment, "train", "mnist-lenet", *data), "none.npz")
    tpu = ("--device", "tpu")
    check_error(maestro(environment, "train", "mnist-lenet", *data, *tpu), "cpu or cuda, not 'tpu'")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.maestro"))


def test_targets_that_make_no_sense_are_one_line(environment: dict[str, str]) -> None:
    def train(*options: str) -> "subprocess.CompletedProcess[str]":
        return maestro(environment, "train", "mnist-lenet", "--data", "none.npz", *options)

    check_error(train("--target-macs", "0.3", "--target-params", "0.3"), "not both")
    check_error(train("--target-macs", "35"), "a share of the dense network, 0..1, not 35")


@pytest.mark.parametrize(
    ("host", "address"), [("::1", "http://[::1]:"), ("localhost", "http://localhost:")]
)
def test_the_address_that_is_served_can_be_opened_as_it_is_printed(host: str, address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        printed = cli._address(Settings(host=host), [listener])

        assert printed == f"{address}{listener.getsockname()[1]}"
