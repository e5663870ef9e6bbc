"""Starts `maestro serve` and `maestro profile` as processes of their own, on cores of their own."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.simulator import scenarios
from maestro_core.artifact import Artifact
from maestro_core.profile import Profile

START_S = 180.0
NONE: Mapping[str, str] = {}

Process = subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True)
class CoreTime:
    """For how long the threads of a server have had a core: that of its event loop, the others."""

    loop_s: float
    others_s: float

    def __sub__(self, earlier: "CoreTime") -> "CoreTime":
        return CoreTime(self.loop_s - earlier.loop_s, self.others_s - earlier.others_s)


@dataclass(frozen=True, slots=True)
class Server:
    """A live server: where it answers, and the number of its process."""

    address: str
    pid: int

    def core_time(self) -> CoreTime:
        """Return for how long its threads have had a core. The event loop's is the first."""
        threads = Path(f"/proc/{self.pid}/task")
        took_s = {
            thread.name: int((thread / "schedstat").read_text(encoding="ascii").split()[0]) / 1e9
            for thread in threads.iterdir()
        }
        loop_s = took_s.pop(str(self.pid))
        return CoreTime(loop_s, sum(took_s.values()))

    def interrupted_s(self) -> float:
        """Return for how long it has computed for batches that were interrupted."""
        with urllib.request.urlopen(f"{self.address}/metrics") as answer:  # noqa: S310  our own
            families = text_string_to_metric_families(answer.read().decode())
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == "maestro_preempted_seconds_total"
        )


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Keep this thread to `cores` inside, and what it starts there for good."""
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, ours)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def cores_apart() -> Iterator[tuple[set[int], set[int]]]:
    """Keep this process to one core; yield that, and the cores for servers (all, if only one)."""
    cores = os.sched_getaffinity(0)
    sending = {min(cores)}
    with on_cores(sending):
        yield sending, cores - sending or cores


def profiled(model: Artifact, folder: Path, cores: set[int], *, quick: bool) -> Profile:
    """Return the profile of the host that servers in `folder` will find there.

    Raises:
        ChildProcessError: none could be made; with the last lines of what was said.
    """
    given = ["profile", str(model.path), *(["--quick"] if quick else [])]
    log = folder / "profile.log"
    with ending(lambda: _run(given, folder, cores, log), _end) as process:
        failed = process.wait()
    if failed:
        raise ChildProcessError(f"no profile could be made:\n{_end_of(log)}")
    (path,) = (folder / "profiles").glob("*/profile.json")
    return Profile.from_json(path.read_text(encoding="utf-8"))


@contextmanager
def server(
    model: Artifact, folder: Path, policy: str, cores: set[int], **variables: str
) -> Iterator[Server]:
    """Serve by a policy on `cores`, with settings besides; yield the server once it is ready.

    Raises:
        ChildProcessError: it ended, or isn't after three minutes; with the last lines of its log.
    """
    given = "--policy", policy
    with serving(model, folder, cores, *given, variables=variables) as (address, pid):
        yield Server(address, pid)


@contextmanager
def serving(
    model: Artifact,
    folder: Path,
    cores: set[int],
    *options: str,
    workers: int = 1,
    variables: Mapping[str, str] = NONE,
) -> Iterator[tuple[str, int]]:
    """Serve on `cores`; yield the address and the process's number once it is ready.

    Raises:
        ChildProcessError: as `server`.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    words = [*options, "--workers", str(workers)]
    log = folder / f"{'-'.join([*words, *variables.values()]).strip('-')}.log"
    given = ["serve", str(model.path), "--port", str(port), *words]
    with ending(lambda: _run(given, folder, cores, log, workers, variables), _end) as process:
        until_s = time.monotonic() + START_S
        while not _is_ready(address):
            if process.poll() is not None or time.monotonic() > until_s:
                raise ChildProcessError(
                    f"the server ({' '.join(words)}) did not start:\n{_end_of(log)}"
                )
            time.sleep(0.2)
        yield address, process.pid


@contextmanager
def ending(start: Callable[[], Process], end: Callable[[Process], None]) -> Iterator[Process]:
    """Start a process, and end it whatever comes: a signal waits until it is known."""
    process: Process | None = None
    came: list[int] = []
    handlers = {
        each: signal.signal(each, lambda number, _: came.append(number))
        for each in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        try:
            process = start()
        finally:
            for each, handler in handlers.items():
                signal.signal(each, handler)
        for number in came:
            signal.raise_signal(number)
        yield process
    finally:
        if process is not None:
            end(process)


def _end(process: Process) -> None:
    """End what was started, if it has not ended by itself."""
    process.terminate()
    process.wait(30)


def _run(
    arguments: Sequence[str],
    folder: Path,
    cores: set[int],
    log: Path,
    workers: int = 1,
    variables: Mapping[str, str] = NONE,
) -> Process:
    """Start the program on `cores`.

    Kept warm, servers that are not asked would take time of the one that is.
    """
    settings = {
        "MAESTRO_STATE_DIR": str(folder),
        "MAESTRO_THREADS": str(max(1, len(cores) // workers)),
        "MAESTRO_MAX_QUEUE": str(scenarios.MAX_QUEUE),
        "MAESTRO_KEEP_WARM_MS": "0",
        **variables,
    }
    # -P: the server that is installed, as this program is, not one of the directory we are in.
    program = [sys.executable, "-P", "-c", "from maestro_core.cli import main; main()"]
    with on_cores(cores), log.open("wb") as said:
        return subprocess.Popen(  # noqa: S603  our own program
            [*program, *arguments], env=os.environ | settings, stdout=said, stderr=said
        )


def _end_of(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=2):  # noqa: S310  our own server
            return True
    except (urllib.error.URLError, OSError):
        return False


def npy_sample(model: Artifact) -> bytes:
    """Return one made-up sample as an `.npy` file."""
    file = io.BytesIO()
    shape = (1, *model.manifest.input.shape[1:])
    np.save(file, np.random.default_rng(0).standard_normal(shape, np.float32))
    return file.getvalue()
