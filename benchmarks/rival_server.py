"""Starts the programs of `benchmarks/overhead_rivals`, each by a Python that has what it needs."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.own_server import Process, ending, free_port, on_cores

START_S = 60.0
END_S = 10.0
FLOOR = "floor"
# The rivals, by the name of the package that brings them.
PROGRAMS = ("mosec", "mlserver", "bentoml", "litserve")

_FOLDER = Path(__file__).parent / "overhead_rivals"


class MissingError(Exception):
    """A rival that cannot be run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Started:
    """A server that listens, its version, and the group of its processes."""

    address: str
    version: str
    group: int


@contextmanager
def rival(name: str, python: str, model: Path, cores: set[int]) -> Iterator[Started]:
    """Serve the ONNX graph `model` on `cores`, with as many threads.

    Raises:
        MissingError: that Python lacks it, or it did not start.
    """
    package = "fastapi" if name == FLOOR else name
    version = installed(package, python)
    program = _FOLDER / (f"{name}.py" if name == FLOOR else f"{name}_server.py")
    port = free_port()
    command = [python, str(program), str(model.resolve()), str(len(cores)), str(port)]
    with ending(lambda: _start(command, cores), _end) as process:
        _wait_until_listening(name, process, port)
        yield Started(f"http://127.0.0.1:{port}", version, process.pid)


def installed(package: str, python: str) -> str:
    """Return the version of a package that another Python has.

    Raises:
        MissingError: it has none, or is no Python.
    """
    program = f"from importlib.metadata import version; print(version('{package}'))"
    try:
        found = subprocess.run(  # noqa: S603  a Python that the user named
            [python, "-c", program], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingError(f"{python} has no {package}") from error
    return found.stdout.strip()


def _start(command: list[str], cores: set[int]) -> Process:
    """Start a program on `cores`, the first of a group of its own."""
    with on_cores(cores):
        return subprocess.Popen(  # noqa: S603  our own program
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def _wait_until_listening(name: str, process: Process, port: int) -> None:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.2)
    raise MissingError(f"{name} did not start within {START_S:g} s")


def _end(process: Process) -> None:
    """End a server and the processes that it made."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
