"""Clients that send slowly, endlessly or nothing: they are cut off, and others are served."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.server_process import server_process

TIMEOUT_S = 1.0
MAX_CONNECTIONS = 50
PICTURE = min((Path(__file__).parents[1] / "examples").glob("*.png"))
POST = b"POST /infer HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Yield the address of a server with tight limits, and its process's number."""
    with server_process(
        tmp_path_factory.mktemp("state"),
        MAESTRO_CALIBRATION_BUDGET_S="1",
        MAESTRO_RECEIVE_TIMEOUT_S=str(TIMEOUT_S),
        MAESTRO_MAX_CONNECTIONS=str(MAX_CONNECTIONS),
    ) as (address, process):
        yield address, process.pid


def connect(address: str) -> socket.socket:
    host, _, port = address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def assert_served(address: str) -> None:
    headers = {"content-type": "image/png"}
    answer = httpx.post(f"{address}/infer", content=PICTURE.read_bytes(), headers=headers)
    assert answer.json()["labels"] == [PICTURE.stem]


def read_to_end(connection: socket.socket) -> bytes:
    """Return all that the server sends until it ends the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * 4096


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(POST + b"x-slow: ", id="headers without an end"),
        pytest.param(POST + b"content-length: 1000\r\n\r\n[", id="a body without an end"),
        pytest.param(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\nGET /", id="a second request"),
    ],
)
def test_a_request_that_trickles_in_is_cut_off(server: tuple[str, int], start: bytes) -> None:
    address, _ = server
    began_s = time.monotonic()
    with connect(address) as slow:
        slow.sendall(start)

        def trickle() -> None:
            with suppress(OSError):
                while start and time.monotonic() < began_s + 8 * TIMEOUT_S:
                    time.sleep(TIMEOUT_S / 10)
                    slow.sendall(b"1")

        sender = threading.Thread(target=trickle)
        sender.start()
        assert_served(address)
        read_to_end(slow)
        took_s = time.monotonic() - began_s
        sender.join()

    assert 0.9 * TIMEOUT_S < took_s < 6 * TIMEOUT_S


def test_headers_over_the_limit_are_cut_off(server: tuple[str, int]) -> None:
    address, pid = server
    before = resident_bytes(pid)
    line = b"x-long: " + b"1" * 8000 + b"\r\n"
    sent = 0
    with connect(address) as endless:
        endless.sendall(POST)
        with suppress(OSError):
            while sent < 64 * 2**20:
                endless.sendall(line)
                sent += len(line)

    assert sent < 64 * 2**20
    assert resident_bytes(pid) - before < 16 * 2**20
    assert_served(address)


def test_idle_connections_give_up_their_places(server: tuple[str, int]) -> None:
    address, pid = server
    before = resident_bytes(pid)
    with ExitStack() as idle:
        for _ in range(8 * MAX_CONNECTIONS):
            idle.enter_context(connect(address))
        assert_served(address)
        open_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))

    assert open_files < 2 * MAX_CONNECTIONS
    assert resident_bytes(pid) - before < 16 * 2**20


def test_where_few_files_may_be_open_idle_connections_give_up_their_places(tmp_path: Path) -> None:
    max_files = 128
    limit = f"resource.setrlimit(resource.RLIMIT_NOFILE, ({max_files}, {max_files}))"
    first, budget = f"import resource; {limit}", {"MAESTRO_CALIBRATION_BUDGET_S": "1"}
    with server_process(tmp_path, None, first, **budget) as (address, _), ExitStack() as stack:
        for _ in range(max_files):
            stack.enter_context(connect(address))

        assert_served(address)


def test_a_body_over_the_limit_is_refused_before_it_is_sent(server: tuple[str, int]) -> None:
    address, _ = server
    with connect(address) as large:
        large.sendall(POST + b"content-length: 10000000000\r\n\r\n")
        assert large.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_body_of_chunks_is_read_no_further_than_the_limit(server: tuple[str, int]) -> None:
    address, pid = server
    before = resident_bytes(pid)
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    with connect(address) as large:
        large.sendall(POST + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(17):  # MiB; the limit is 16
            large.sendall(chunk)
        assert large.recv(65536).startswith(b"HTTP/1.1 413 ")

    assert resident_bytes(pid) - before < 80 * 2**20
    assert_served(address)


def test_a_client_that_stays_is_not_cut_off_between_requests(server: tuple[str, int]) -> None:
    address, _ = server
    with httpx.Client(base_url=address) as client:
        until_s = time.monotonic() + 2 * TIMEOUT_S
        while time.monotonic() < until_s:
            assert client.get("/livez").status_code == 200
            time.sleep(TIMEOUT_S / 4)


def test_headers_near_the_limit_and_a_body_past_it_are_served(server: tuple[str, int]) -> None:
    address, _ = server
    picture = PICTURE.read_bytes()
    headers = {"content-type": "image/png"}
    large = headers | {"x-padding": "a" * 60_000}

    answers = [
        httpx.post(f"{address}/infer", content=picture + bytes(200_000), headers=large),
        httpx.post(f"{address}/infer", content=picture, headers=headers),
    ]

    assert [answer.status_code for answer in answers] == [200, 200]
