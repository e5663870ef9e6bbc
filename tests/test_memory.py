"""An hour's worth of requests leaves the server's resident memory as it was."""

import os
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest

from maestro_core.artifact import Artifact
from tests.server_process import server_process

# At one request a second; more with MAESTRO_TEST_REQUESTS.
REQUESTS = int(os.environ.get("MAESTRO_TEST_REQUESTS", "3600"))
WARM_UP = 1500
BODY = {"inputs": np.zeros((1, 8, 8)).tolist()}


@pytest.mark.slow
def test_resident_memory_stays(tiny_artifact: Artifact, tmp_path: Path) -> None:
    with (
        server_process(tmp_path, tiny_artifact.path) as (address, process),
        httpx.Client(base_url=address) as client,
    ):
        send(client, WARM_UP)
        before = resident_pages(process.pid)
        send(client, REQUESTS)
        after = resident_pages(process.pid)

    assert after < 1.02 * before


def send(client: httpx.Client, count: int) -> None:
    for _ in range(count):
        assert client.post("/infer", json=BODY).status_code == 200


def resident_pages(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
