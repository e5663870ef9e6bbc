"""Several workers behind one port: real processes that share, die, are replaced, and end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from maestro_core import artifact, held_out
from maestro_core.artifact import Artifact
from maestro_core.host import usable_cores
from server.counting import TOGETHER
from server.signals import REPEAT_S
from tests.conftest import tiny_contents, tiny_manifest
from tests.server_process import server_process, starting_server
from tests.test_search_serving import TABLES, X

pytestmark = pytest.mark.skipif(
    usable_cores() < 2 or not Path("/proc/self/smaps_rollup").exists(),
    reason="needs two cores, and Linux to look at its processes",
)

BODY = {"inputs": np.zeros((1, 8, 8)).tolist()}
WAIT_S = 60.0
PROGRAM = [sys.executable, "-c", "from maestro_core.cli import main; main()"]
TWO = {"MAESTRO_WORKERS": "2", "MAESTRO_CALIBRATION_BUDGET_S": "1"}

Server = tuple[str, "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("artifact") / "tiny.maestro"
    return artifact.save(path, tiny_manifest(), tiny_contents())


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a state directory; the first server leaves its profile there."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(tiny: Artifact, state: Path) -> Iterator[Server]:
    with server_process(state, tiny.path, **TWO) as (address, process):
        until(lambda: serving(process, 2))
        yield address, process


def until(holds: Callable[[], Any]) -> Any:
    """Wait until it holds; return what it returned."""
    give_up_s = time.monotonic() + WAIT_S
    while time.monotonic() < give_up_s:
        if found := holds():
            return found
        time.sleep(0.02)
    raise AssertionError("it never held")


def children(process: "subprocess.Popen[str]") -> list[int]:
    """Return the workers' process ids."""
    return list(
        map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    )


def answered(address: str) -> float:
    """Return how many requests the metrics say were answered in time or late."""
    text = httpx.get(f"{address}/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "maestro_requests_total" and sample.labels["outcome"] in ("ok", "late")
    )


def exists(pid: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def serving(process: "subprocess.Popen[str]", workers: int) -> list[int]:
    """Return the workers' process ids once so many accept connections, else nothing."""
    pids = [pid for pid in children(process) if board_of(pid)]
    if len(pids) < workers:
        return []
    board = Path(board_of(pids[0])[0].split()[5]).read_bytes()[: 8 * workers]
    return pids if min(memoryview(board).cast("q")) >= 0 else []


def board_of(pid: int) -> list[str]:
    """Return the lines of a process's map that are of what all workers count."""
    return [line for line in maps(pid) if line.endswith("/board")]


def maps(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []


def connections_of(pid: int) -> set[str]:
    """Return the open connections of a process over TCP, by inode."""
    table = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    established = {line.split()[9] for line in table if line.split()[3] == "01"}
    links = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(path.readlink()))
    return {link[8:-1] for link in links if link.startswith("socket:")} & established


def httpx_get(url: str) -> dict[str, Any]:
    """Return what a server says, ready or not; nothing while it can't be reached."""
    try:
        found: dict[str, Any] = httpx.get(url).json()
    except httpx.TransportError:
        return {}
    return found


def weights_of(pid: int) -> set[str]:
    """Return the inodes of the baked weights that a process maps."""
    return {line.split()[4] for line in maps(pid) if line.endswith("/weights.bin")}


def test_all_workers_answer_and_what_they_count_adds_up(
    server: Server,
) -> None:
    address, process = server
    before = answered(address)
    with ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=address)) for _ in range(8)]
        for client in clients * 5:
            assert client.post("/infer", json=BODY).status_code == 200
        held = [len(connections_of(pid)) for pid in children(process)]

        assert min(held) > 0, "a worker had none of eight connections"
        for client in clients:
            stats = client.get("/v2/models/tiny/stats").json()["model_stats"][0]
            assert stats["inference_count"] == before + 40
            assert stats["inference_stats"]["success"]["count"] == before + 40
        assert {answered(address) for _ in clients} == {before + 40}
    text = httpx.get(f"{address}/metrics").text
    assert "\nmaestro_ready 1.0\n" in text
    assert "\nmaestro_queue_depth 0.0\n" in text


def test_workers_have_cores_of_their_own_and_map_the_same_weights(
    server: Server,
) -> None:
    _, process = server
    one, other = children(process)

    assert not os.sched_getaffinity(one) & os.sched_getaffinity(other)
    assert len(os.sched_getaffinity(one)) == len(os.sched_getaffinity(other))
    assert len(weights_of(one)) == 1
    assert weights_of(one) == weights_of(other)
    assert weights_of(process.pid) == set(), "the supervisor has weights"


def test_one_calibration_at_a_time_known_to_all_and_used_by_all(
    server: Server, state: Path
) -> None:
    address, _ = server
    with ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=address)) for _ in range(6)]
        started = clients[0].post("/profile", json={"kind": "full"})
        assert started.status_code == 202
        for client in clients:
            refused = client.post("/profile", json={})
            assert (refused.status_code, refused.json()["job"]) == (409, started.json()["id"])
            assert client.get(started.headers["location"]).json()["state"] == "running"
            assert client.get("/profile/jobs/none").status_code == 404
        assert clients[-1].delete(started.headers["location"]).status_code == 200
        until(lambda: clients[1].get(started.headers["location"]).json()["state"] == "cancelled")

        again = clients[2].post("/profile", json={"kind": "quick"})
        until(lambda: clients[3].get(again.headers["location"]).json()["state"] == "done")
        profiles = [client.get("/profile").json() for client in clients]
        assert {profile["source"] for profile in profiles} == {"measured"}
        assert len({json.dumps(profile["profile"]) for profile in profiles}) == 1
        (stored,) = state.rglob("profile.json")
        assert (
            json.loads(stored.read_text())["measured_at"] == (profiles[0]["profile"]["measured_at"])
        )


def test_points_that_one_worker_finds_are_served_by_all(tmp_path: Path) -> None:
    extra = held_out.contents(X, np.zeros(len(X), np.int64), ("conv", "fc"), TABLES)
    path = tmp_path / "tiny.maestro"
    artifact.save(path, tiny_manifest(), {**tiny_contents(), **extra})
    with (
        server_process(tmp_path, path, **TWO, MAESTRO_MAX_BATCH="2") as (address, process),
        ExitStack() as stack,
    ):
        until(lambda: serving(process, 2))
        clients = [stack.enter_context(httpx.Client(base_url=address)) for _ in range(6)]
        before = clients[0].get("/profile").json()["profile"]["key"]["artifact"]

        def accepted() -> httpx.Response | None:
            """Start a search, once the first calibration has stored what already serves."""
            started = clients[1].post("/profile", json={"kind": "quick", "search": True})
            return None if started.status_code == 409 else started

        job = until(accepted).headers["location"]
        assert until(lambda: ended(clients[2], job))["state"] == "done"
        used = [client.get("/profile").json()["profile"]["key"]["artifact"] for client in clients]
        points = [client.get("/frontier").content for client in clients]
    assert set(used) != {before}
    assert len(set(used)) == len(set(points)) == 1


def ended(client: httpx.Client, job: str) -> dict[str, Any] | None:
    found: dict[str, Any] = client.get(job).json()
    return None if found["state"] == "running" else found


def test_a_profile_is_reused_by_as_many_workers_and_no_others(
    server: Server, tiny: Artifact, state: Path
) -> None:
    del server  # its profile is in the state directory
    (stored,) = state.rglob("profile.json")
    assert json.loads(stored.read_text())["key"]["workers"] == 2
    before = stored.read_bytes()

    with server_process(state, tiny.path, **TWO) as (address, _):
        assert httpx.get(f"{address}/profile").json()["source"] == "stored"
    with server_process(state, tiny.path, **{**TWO, "MAESTRO_WORKERS": "1"}) as (address, _):
        assert httpx.get(f"{address}/profile").json()["source"] == "measured"

    assert stored.read_bytes() == before
    assert len(list(state.rglob("profile.json"))) == 2
    assert len(list((state / "baked").iterdir())) == 1


class Callers:
    """Four clients that ask on and on, each on a connection of its own; a new one when it broke."""

    def __init__(self, address: str) -> None:
        self.statuses: list[int] = []
        self.lost: list[str] = []
        self._address, self._over = address, threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(4)]

    def __enter__(self) -> "Callers":
        for thread in self._threads:
            thread.start()
        until(lambda: len(self.statuses) > 40)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        while not self._over.is_set():
            with httpx.Client(base_url=self._address, timeout=WAIT_S) as client:
                try:
                    while not self._over.is_set() and client.get("/readyz").status_code == 200:
                        self.statuses.append(client.post("/infer", json=BODY).status_code)
                except httpx.TransportError as error:
                    self.lost.append(repr(error))
                else:
                    return


def test_a_worker_that_is_killed_costs_what_it_held_and_is_replaced(
    server: Server, tiny: Artifact, state: Path
) -> None:
    del server  # its profile is in the state directory
    with (
        server_process(state, tiny.path, **TWO) as (address, process),
        Callers(address) as callers,
        ExitStack() as stack,
    ):
        one, other = until(lambda: serving(process, 2))
        counted, held = answered(address), len(connections_of(one))
        os.kill(one, signal.SIGKILL)
        until(lambda: not exists(one))
        (new,) = until(lambda: set(children(process)) - {one, other})

        def has_a_connection() -> bool:
            """Connect until the new worker, which has fewest, takes one."""
            client = stack.enter_context(httpx.Client(base_url=address))
            assert client.get("/readyz").status_code == 200, "it takes some before it is ready"
            return bool(connections_of(new))

        until(has_a_connection)
        assert answered(address) >= counted
        assert len(callers.lost) <= held
        assert other in children(process)
        callers.stop()

        assert set(callers.statuses) == {200}
        # Answers are counted after they are sent: the last of the one killed may not have been.
        assert answered(address) > len(callers.statuses) - TOGETHER - held


def test_a_worker_that_stands_still_is_replaced(
    server: Server, tiny: Artifact, state: Path
) -> None:
    del server
    sooner = (
        "from server.processes import hub, supervisor; hub._HUNG_S = 1.0; supervisor._LOOK_S = 0.1"
    )
    with server_process(state, tiny.path, sooner, **TWO) as (address, process):
        one, other = until(lambda: serving(process, 2))
        os.kill(one, signal.SIGSTOP)

        until(lambda: not exists(one))
        assert other in until(lambda: serving(process, 2))
        assert httpx.post(f"{address}/infer", json=BODY).status_code == 200


def test_sigterm_under_load_ends_all_and_loses_no_answer(
    server: Server, tiny: Artifact, state: Path
) -> None:
    del server
    with (
        server_process(state, tiny.path, **TWO, MAESTRO_DRAIN_S="1") as (address, process),
        Callers(address) as callers,
    ):
        pids = until(lambda: serving(process, 2))
        process.send_signal(signal.SIGTERM)
        for pid in pids:  # as a service manager does, which knows of all processes
            os.kill(pid, signal.SIGTERM)

        assert process.wait(WAIT_S) == 0
        assert not any(map(exists, pids))
    assert callers.lost == []
    assert set(callers.statuses) == {200}


def test_a_signal_that_comes_twice_at_once_is_one(
    server: Server, tiny: Artifact, state: Path
) -> None:
    del server
    drain = {"MAESTRO_DRAIN_S": "2"}
    with server_process(state, tiny.path, **TWO, **drain) as (address, process):
        until(lambda: serving(process, 2))
        process.send_signal(signal.SIGTERM)
        time.sleep(REPEAT_S / 20)
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx_get(f"{address}/readyz").get("ready") is not True)

        assert httpx.post(f"{address}/infer", json=BODY).status_code == 200
        assert process.wait(WAIT_S) == 0


def test_workers_serve_where_standard_input_is_closed(
    server: Server, tiny: Artifact, state: Path
) -> None:
    del server
    with server_process(state, tiny.path, "import os; os.close(0)", **TWO) as (address, _):
        assert httpx.post(f"{address}/infer", json=BODY).status_code == 200


def test_no_worker_outlives_its_supervisor(server: Server, tiny: Artifact, state: Path) -> None:
    del server
    with server_process(state, tiny.path, **TWO) as (_, process):
        pids = until(lambda: serving(process, 2))
        (directory,) = {line.split()[5] for pid in pids for line in board_of(pid)}
        process.kill()

        until(lambda: not any(map(exists, pids)))
        assert not Path(directory).exists()


def test_a_calibration_that_loses_its_worker_is_begun_again(tiny: Artifact, tmp_path: Path) -> None:
    budget = {**TWO, "MAESTRO_CALIBRATION_BUDGET_S": "2"}
    with starting_server(tmp_path, tiny.path, **budget) as (address, process):
        until(lambda: httpx_get(f"{address}/readyz").get("calibration"))
        os.kill(children(process)[0], signal.SIGKILL)

        until(lambda: httpx_get(f"{address}/readyz").get("ready"))
        assert httpx.get(f"{address}/profile").json()["source"] == "measured"


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        (["--workers", "0"], 1, "MAESTRO_WORKERS: Input should be greater than or equal to 1"),
        (["--workers", "many"], 2, "Invalid value for '--workers'"),
        (["--workers", "1000"], 1, f"this process may use {usable_cores()}"),
    ],
)
def test_a_number_of_workers_that_cannot_be_is_one_clear_error(
    given: list[str], status: int, said: str, tiny: Artifact
) -> None:
    refused = serve(tiny.path, *given)

    assert refused.returncode == status
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_port_that_is_taken_is_one_clear_error(server: Server, tiny: Artifact) -> None:
    port = server[0].rpartition(":")[2]

    refused = serve(tiny.path, "--workers", "2", "--port", port)

    assert refused.returncode == 1
    assert refused.stderr.startswith(f"maestro: the server did not start on 127.0.0.1:{port}: ")
    assert refused.stderr.count("\n") == 1
    assert refused.stdout == ""


def test_workers_that_cannot_start_end_the_whole_with_their_reason(
    tiny: Artifact, tmp_path: Path
) -> None:
    taken = {"MAESTRO_PROVIDER": "cuda", "MAESTRO_STATE_DIR": str(tmp_path)}

    refused = serve(tiny.path, "--workers", "2", "--port", "0", **taken)

    assert refused.returncode == 1
    assert "ended 3 times before it served: provider 'cuda' is not in" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert refused.stdout.count("2 workers") == 1


def serve(path: Path, *options: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*PROGRAM, "serve", str(path), *options],
        env=os.environ | {"COLUMNS": "200"} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )
