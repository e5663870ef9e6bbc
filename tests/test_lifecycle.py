"""How a server ends: told to, while clients call it."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import uvicorn
import uvloop

from maestro_core.artifact import Artifact
from maestro_core.host import usable_cores
from server.listening import listen
from server.running import _Server
from server.signals import REPEAT_S
from tests.server_process import server_process, starting_server, wait_until_ready

BODY = {"inputs": np.zeros((1, 8, 8)).tolist()}


def test_sigterm_under_load_loses_no_answer(tiny_artifact: Artifact, tmp_path: Path) -> None:
    statuses: list[int] = []
    lost: list[str] = []

    def call(address: str) -> None:
        """Send requests as a balancer does: for as long as the server says that it is ready."""
        with httpx.Client(base_url=address) as client:
            try:
                while client.get("/readyz").status_code == 200:
                    statuses.append(client.post("/infer", json=BODY).status_code)
            except httpx.HTTPError as error:
                lost.append(repr(error))

    with server_process(tmp_path, tiny_artifact.path, MAESTRO_DRAIN_S="1") as (address, process):
        threads = [threading.Thread(target=call, args=(address,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        while len(statuses) < 40:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()

        assert process.wait(30) == 0
    assert lost == []
    assert set(statuses) == {200}


def test_who_never_asks_whether_it_is_ready_is_told_to_go(
    tiny_artifact: Artifact, tmp_path: Path
) -> None:
    answers: list[httpx.Response] = []
    lost: list[str] = []

    def call(address: str) -> None:
        with httpx.Client(base_url=address) as client:
            try:
                while not answers or "close" not in answers[-1].headers.get("connection", ""):
                    answers.append(client.post("/infer", json=BODY))
            except httpx.HTTPError as error:
                lost.append(repr(error))

    with server_process(tmp_path, tiny_artifact.path) as (address, process):
        thread = threading.Thread(target=call, args=(address,))
        thread.start()
        while len(answers) < 40:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        thread.join()

        assert process.wait(30) == 0
    assert lost == []
    assert {answer.status_code for answer in answers[:-1]} == {200}
    assert answers[-1].status_code in (200, 503)


def test_readiness_goes_first_and_serving_goes_on(tiny_artifact: Artifact, tmp_path: Path) -> None:
    with server_process(tmp_path, tiny_artifact.path, MAESTRO_DRAIN_S="2") as (address, process):
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{address}/readyz").status_code == 200:
            time.sleep(0.01)

        assert httpx.get(f"{address}/livez").status_code == 200
        assert httpx.post(f"{address}/infer", json=BODY).status_code == 200
        assert process.wait(30) == 0


def test_a_second_sigterm_does_not_wait_for_the_drain(
    tiny_artifact: Artifact, tmp_path: Path
) -> None:
    with server_process(tmp_path, tiny_artifact.path, MAESTRO_DRAIN_S="600") as (address, process):
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{address}/readyz").status_code == 200:
            time.sleep(0.01)
        time.sleep(REPEAT_S)
        process.send_signal(signal.SIGTERM)

        assert process.wait(30) == 0


def test_sigterm_while_it_loads_ends_it_at_once(tmp_path: Path) -> None:
    artifact = tmp_path / "slow.maestro"
    artifact.mkdir()
    os.mkfifo(artifact / "manifest.json")
    with (
        starting_server(tmp_path, artifact) as (_, process),
        (artifact / "manifest.json").open("wb"),  # opens once the server reads it
    ):
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=30)[1]

    assert process.returncode == 0, log
    assert "Traceback" not in log


def test_a_connection_that_waits_when_a_server_closes_is_answered() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def main() -> bytes:
        listeners = listen("127.0.0.1", 0)
        server = _Server(uvicorn.Config(app, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve(listeners))
        while not server.started:
            await asyncio.sleep(0.001)
        try:
            with socket.create_connection(listeners[0].getsockname(), 10.0) as client:
                client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                server.close(listeners)  # the event loop had no turn to accept it
                return await asyncio.to_thread(client.recv, 12)
        finally:
            server.should_exit = True
            await serving

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == b"HTTP/1.1 204"


def test_a_signal_that_comes_twice_at_once_is_one(tiny_artifact: Artifact, tmp_path: Path) -> None:
    with server_process(tmp_path, tiny_artifact.path, MAESTRO_DRAIN_S="2") as (address, process):
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{address}/readyz").status_code == 200:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)

        assert httpx.post(f"{address}/infer", json=BODY).status_code == 200
        assert process.wait(30) == 0


def test_a_hurried_end_in_the_middle_of_a_calibration_is_clean(tmp_path: Path) -> None:
    with starting_server(tmp_path, MAESTRO_CALIBRATION_BUDGET_S="60") as (address, process):
        while _status(f"{address}/livez") != 200:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(REPEAT_S)
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=30)[1]

    assert process.returncode == 0, log
    assert "Traceback" not in log


def _status(url: str) -> int:
    try:
        return httpx.get(url).status_code
    except httpx.TransportError:
        return 0


@pytest.mark.parametrize("workers", range(1, 1 + min(2, usable_cores())))
def test_a_calibration_goes_on_where_nobody_reads_of_it(
    workers: int, tiny_artifact: Artifact, tmp_path: Path
) -> None:
    variables = {"MAESTRO_CALIBRATION_BUDGET_S": "1", "MAESTRO_WORKERS": str(workers)}
    with starting_server(tmp_path, tiny_artifact.path, **variables) as (address, process):
        assert process.stderr is not None
        process.stderr.close()
        process.stderr = None

        wait_until_ready(address, process)


def test_a_port_that_is_taken_is_one_clear_error(tiny_artifact: Artifact, tmp_path: Path) -> None:
    with server_process(tmp_path, tiny_artifact.path) as (address, _):
        port = address.rpartition(":")[2]
        program = [sys.executable, "-c", "from maestro_core.cli import main; main()"]
        second = subprocess.run(
            [*program, "serve", str(tiny_artifact.path), "--port", port],
            capture_output=True,
            text=True,
            check=False,
        )

    assert second.returncode == 1
    assert f"did not start on 127.0.0.1:{port}" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_json_log_has_an_object_in_every_line(tiny_artifact: Artifact, tmp_path: Path) -> None:
    with server_process(tmp_path / "first", tiny_artifact.path, MAESTRO_LOG_FORMAT="json") as (
        address,
        process,
    ):
        port = address.rpartition(":")[2]
        program = [sys.executable, "-c", "from maestro_core.cli import main; main()"]
        second = subprocess.run(
            [*program, "serve", str(tiny_artifact.path), "--port", port],
            env=os.environ
            | {"MAESTRO_LOG_FORMAT": "json", "MAESTRO_STATE_DIR": str(tmp_path / "second")},
            capture_output=True,
            text=True,
            check=False,
        )
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=30)[1]

    lines = [json.loads(line) for line in log.splitlines()]
    assert any(f"on {address}" in line["message"] for line in lines)
    assert second.returncode == 1
    assert second.stdout == ""
    lines = [json.loads(line) for line in second.stderr.splitlines()]
    assert lines[-1]["level"] == "error"
    assert f"did not start on 127.0.0.1:{port}" in lines[-1]["message"]


def test_a_json_log_tells_of_settings_that_are_wrong_too() -> None:
    program = [sys.executable, "-c", "from maestro_core.cli import main; main()"]
    ended = subprocess.run(
        [*program, "serve"],
        env=os.environ | {"MAESTRO_LOG_FORMAT": "json", "MAESTRO_MAX_QUEUE": "none"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = [json.loads(line) for line in ended.stderr.splitlines()]
    assert line["level"] == "error"
    assert line["message"].startswith("MAESTRO_MAX_QUEUE: ")


@pytest.mark.skipif(not socket.has_ipv6, reason="the host has no IPv6")
def test_the_address_that_a_server_says_is_its_own(tiny_artifact: Artifact, tmp_path: Path) -> None:
    variables = {"MAESTRO_HOST": "::1", "MAESTRO_LOG_FORMAT": "json"}  # to stderr, which is read
    with starting_server(tmp_path, tiny_artifact.path, **variables) as (address, process):
        assert process.stderr is not None
        messages = (json.loads(line)["message"] for line in process.stderr)
        said = next(message for message in messages if message.startswith("tiny on "))

    port = address.rpartition(":")[2]
    assert said.startswith(f"tiny on http://[::1]:{port}; ")
