"""Every call as its description allows and forbids it, and mangled bytes: no 5xx but 503 and 504.

`make fuzz` sends more of them.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from maestro_core import artifact, held_out
from tests.conftest import tiny_contents, tiny_manifest
from tests.server_process import running_server
from tests.test_protocol import binary_request
from tests.test_search_serving import TABLES, X

CASES = int(os.environ.get("MAESTRO_FUZZ_CASES", "10"))
PATH = "/v2/models/tiny/infer"
SAMPLES = np.zeros((2, 1, 8, 8), np.float32)

NOT_CHECKED = {
    # A description can't say that as many numbers must follow as the shape says.
    "positive_data_acceptance",
    # DELETE cancels a calibration; what became of it can still be read.
    "use_after_free",
}
EXPECTED = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "4xx", 503, 504]
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root: Path = tmp_path_factory.mktemp("fuzz")
    extra = held_out.contents(X, np.zeros(len(X), np.int64), ("conv", "fc"), TABLES)
    artifact.save(root / "tiny.maestro", tiny_manifest(), {**tiny_contents(), **extra})
    with running_server(root, root / "tiny.maestro", MAESTRO_CALIBRATION_BUDGET_S="1") as running:
        yield running


def test_every_call_does_as_its_description_says(address: str, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(EXPECTED)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"),
            *("--checks", "all", "--exclude-checks", ",".join(sorted(NOT_CHECKED))),
            *("--max-examples", str(CASES), "--generation-deterministic"),
            *("--continue-on-failure", "--no-color", "--request-timeout", "30"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "Tested: 16" in run.stdout


@settings(max_examples=20 * CASES)
@given(
    junk=strategies.binary(max_size=8),
    cut=strategies.tuples(strategies.integers(0, 700), strategies.integers(0, 40)),
    length=strategies.none() | strategies.integers(-2, 900),
)
def test_mangled_tensors_are_answered(
    address: str, junk: bytes, cut: tuple[int, int], length: int | None
) -> None:
    whole, json_length = binary_request(SAMPLES.tobytes())
    start, size = cut
    headers = {"inference-header-content-length": json_length if length is None else str(length)}

    body = whole[:start] + junk + whole[start + size :]
    answer = httpx.post(f"{address}{PATH}", content=body, headers=headers, timeout=30)

    assert answer.status_code in (200, 400, 413, 422, 503, 504)
