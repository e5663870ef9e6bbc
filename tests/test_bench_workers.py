"""Several processes against one: what is asked, and what is added up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import workers
from maestro_core.artifact import Artifact
from maestro_core.host import affinity

CHILD = "import sys; kept = bytearray(50 * 2**20); print('up', flush=True); sys.stdin.read()"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdin=subprocess.PIPE)
child.communicate(sys.stdin.read())
"""


def test_memory_is_that_of_a_process_and_its_children() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = workers.tree_mib(process.pid)
        process.communicate()

    assert found["pss"] >= found["private"] > 50
    assert found["pss"] < 150


def test_processes_that_load_no_model_share_what_they_import() -> None:
    one, three = workers.imported_mib(1), workers.imported_mib(3)

    assert one > 50  # numpy, ONNX Runtime and FastAPI are in it
    assert one < three < 3 * one


@pytest.mark.parametrize("wrong", [["--workers", "1"], ["--workers", "999"]])
def test_what_cannot_be_measured_is_refused(tiny_artifact: Artifact, wrong: list[str]) -> None:
    with pytest.raises(ValueError, match=wrong[0]):
        workers.main([str(tiny_artifact.path), *wrong])


@pytest.mark.skipif(len(affinity()) < 2, reason="two workers need two cores")
def test_a_short_run_has_a_figure_of_both(tiny_artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "workers.json"

    workers.main([str(tiny_artifact.path), "--workers", "2", "--seconds", "0.2", "--rounds", "1",
                  "--out", str(out)])  # fmt: skip

    found = json.loads(out.read_text())
    assert found["memory_mib"]["2"]["pss"] > found["memory_mib"]["1"]["pss"]
    assert found["per_s"].keys() == {"1", "2"}
    assert min(found["per_s"].values()) > 0
