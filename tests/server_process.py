"""A real server in a process of its own, for the tests that need one."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx

START_S = 60.0


@contextmanager
def running_server(
    state_dir: Path, artifact: Path | None = None, **variables: str
) -> Iterator[str]:
    """Start `maestro serve` on a free port; yield its address once it is ready."""
    with server_process(state_dir, artifact, **variables) as (address, process):
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@contextmanager
def server_process(
    state_dir: Path, artifact: Path | None = None, first: str = "pass", /, **variables: str
) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Start `maestro serve` on a free port; yield its address and itself once it is ready."""
    with starting_server(state_dir, artifact, first, **variables) as (address, process):
        wait_until_ready(address, process)
        yield address, process


@contextmanager
def starting_server(
    state_dir: Path, artifact: Path | None = None, first: str = "pass", /, **variables: str
) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Start `maestro serve` on a free port; yield its address and itself at once.

    first: what the process does before, in Python.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = f"{first}; from maestro_core.cli import main; main()"
    command = [sys.executable, "-c", program, "serve"]
    ours = {"MAESTRO_STATE_DIR": str(state_dir), "MAESTRO_PORT": str(port)}
    process = subprocess.Popen(
        [*command, *([str(artifact)] if artifact else [])],
        env=os.environ | ours | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        yield address, process
    finally:
        process.kill()
        process.communicate(timeout=30)


def wait_until_ready(address: str, process: "subprocess.Popen[str]") -> None:
    """Return once it is ready.

    Raises:
        RuntimeError: it ended, or it takes too long.
    """
    give_up_s = time.monotonic() + START_S
    while time.monotonic() < give_up_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {process.communicate()[1]}")
        try:
            if httpx.get(f"{address}/v2/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the server was not ready within {START_S} s")
