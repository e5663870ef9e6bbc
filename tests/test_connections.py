"""Requests that are begun and answered on their connection, and those that the application has."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from uvicorn.server import ServerState

from maestro_core.artifact import Artifact
from server.connections import HEAD_BYTES, MOST_PIPELINED, Limits, limited
from server.direct import FAILED
from tests.server_process import running_server

HEAD = b"POST /infer HTTP/1.1\r\nhost: x\r\n"
SEVEN = HEAD + b"content-length: 7\r\n\r\nabcdefg"


class FakeTransport(asyncio.Transport):
    """Keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.is_closed = self.is_broken = False
        self.aborted = asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.is_broken:  # as uvloop's
            raise RuntimeError("the handler is closed")
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True
        self.aborted.set()

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class UnderWay:
    def __init__(self, tell: Callable[[bytes | Exception], None]) -> None:
        self.tell = tell
        self.is_given_up = False

    def answer(self, outcome: bytes | Exception) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        if isinstance(outcome, Exception):
            raise outcome
        return 200, [(b"content-length", str(len(outcome)).encode())], outcome

    def give_up(self) -> None:
        self.is_given_up = True


class Whole:
    """Begins what has a body other than "usual"; "wrong" is refused."""

    paths = ("/infer",)

    def __init__(self) -> None:
        self.begun: list[UnderWay] = []

    def begin(
        self, scope: Mapping[str, Any], body: bytes, tell: Callable[[bytes | Exception], None]
    ) -> UnderWay | None:
        assert scope["path"] in self.paths
        if body == b"wrong":
            raise ValueError("wrong")
        if body == b"usual":
            return None
        self.begun.append(UnderWay(tell))
        return self.begun[-1]


class Driven:
    """A connection whose transport is a fake; `asked` is what came to the application.

    /slow is answered once it `may_answer`, /early before its body is here.
    """

    def __init__(self, receive_timeout_s: float) -> None:
        self.is_leaving = False
        self.may_answer = asyncio.Event()
        self.whole, self.transport = Whole(), FakeTransport()
        self.asked: list[tuple[str, bytes, Exception | None]] = []
        config = uvicorn.Config(self._app, interface="asgi3", log_config=None, lifespan="off")
        config.load()
        protocol: Any = limited(
            Limits(10, receive_timeout_s), self.whole, is_leaving=lambda: self.is_leaving
        )
        self.protocol = protocol(config=config, server_state=ServerState(), app_state={})
        self.protocol.connection_made(self.transport)

    async def receive(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.protocol.data_received(piece)
            await turns()

    async def finish(self, body: bytes | Exception = b"done") -> None:
        """End what was begun last."""
        self.whole.begun[-1].tell(body)
        await turns()

    async def _app(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        body, more = b"", scope["path"] != "/early"
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.asked.append((scope["path"], body, scope["state"].get(FAILED)))
        if scope["path"] == "/slow":
            await self.may_answer.wait()
        headers = [(b"content-length", b"3")]
        await send({"type": "http.response.start", "status": 299, "headers": headers})
        await send({"type": "http.response.body", "body": b"app"})


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def connection(receive_timeout_s: float) -> AsyncIterator[Driven]:
    driven = Driven(receive_timeout_s)
    yield driven
    driven.transport.close()
    driven.protocol.connection_lost(None)
    await turns()


def drive(scenario: Callable[[Driven], Awaitable[None]], receive_timeout_s: float = 30.0) -> None:
    async def main() -> None:
        async with connection(receive_timeout_s) as driven:
            await scenario(driven)

    asyncio.run(main())


@pytest.mark.parametrize("cut", [len(SEVEN), 20, len(SEVEN) - 7, len(SEVEN) - 3])
def test_a_small_request_is_answered_in_one_write_past_the_application(cut: int) -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(SEVEN[:cut], SEVEN[cut:])
        assert driven.transport.written == []
        await driven.finish()
        await driven.receive(SEVEN)
        await driven.finish(b"again")

        first, second = driven.transport.written
        assert first == b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone"
        assert second.endswith(b"\r\n\r\nagain")
        assert not driven.transport.is_closed
        assert driven.asked == []

    drive(scenario)


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(HEAD + b"content-length: 5\r\n\r\nusual", id="not taken"),
        pytest.param(SEVEN.replace(b"/infer", b"/other"), id="another path"),
        pytest.param(SEVEN.replace(b"POST", b"PUT"), id="another method"),
        pytest.param(
            HEAD + b"expect: 100-continue\r\ncontent-length: 7\r\n\r\nabcdefg", id="it expects"
        ),
    ],
)
def test_other_requests_are_the_applications(request_bytes: bytes) -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(request_bytes)

        assert len(driven.asked) == 1
        assert driven.asked[0][2] is None
        assert b"".join(driven.transport.written).endswith(b"app")
        assert driven.whole.begun == []

    drive(scenario)


@pytest.mark.parametrize("cut", [0, 20, -40, -20])
@pytest.mark.parametrize("framing", [b"content-length: 40", b"transfer-encoding: chunked"])
def test_a_wish_for_another_protocol_is_passed_over(framing: bytes, cut: int) -> None:
    body = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n....."
    sent = body if framing.endswith(b"40") else b"28\r\n" + body + b"\r\n0\r\n\r\n"
    upgrade = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AA\r\n"
    request = HEAD.replace(b"/infer", b"/other") + upgrade + framing + b"\r\n\r\n" + sent

    async def scenario(driven: Driven) -> None:
        await driven.receive(request[:cut], request[cut:] + 2 * request)

        assert driven.asked == 3 * [("/other", body, None)]
        assert not driven.transport.is_closed

    drive(scenario)


def test_no_tunnels_are_made() -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(b"CONNECT localhost:80 HTTP/1.1\r\nhost: x\r\n\r\n")

        assert driven.transport.written[0].startswith(b"HTTP/1.1 400 ")
        assert driven.transport.is_closed

    drive(scenario)


@pytest.mark.parametrize("header", [b"content-length: 65537", b"transfer-encoding: chunked"])
def test_a_body_that_may_be_large_is_the_applications_from_its_start(header: bytes) -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(HEAD + header + b"\r\n\r\n")
        assert driven.protocol.tasks

    drive(scenario)


@pytest.mark.parametrize("is_late", [False, True])
def test_an_error_is_the_applications_to_answer(is_late: bool) -> None:
    async def scenario(driven: Driven) -> None:
        if is_late:
            await driven.receive(SEVEN)
            await driven.finish(ValueError("wrong"))
        else:
            await driven.receive(HEAD + b"content-length: 5\r\n\r\nwrong")

        ((path, _, error),) = driven.asked
        assert (path, str(error)) == ("/infer", "wrong")
        assert b"".join(driven.transport.written).endswith(b"app")

    drive(scenario)


def test_trailers_are_dropped_and_limited() -> None:
    async def scenario(driven: Driven) -> None:
        chunked = HEAD + b"transfer-encoding: chunked\r\n\r\n"
        await driven.receive(chunked + b"5\r\nusual\r\n0\r\na: b\r\n\r\n")
        ((_, body, _),) = driven.asked
        assert body == b"usual"
        assert not driven.transport.is_closed

        await driven.receive(chunked + b"5\r\nusual\r\n0\r\n", *[b"a: b\r\n" * 1000] * 12)
        assert b"400 Bad Request" in b"".join(driven.transport.written)
        assert driven.transport.is_closed

    drive(scenario)


def test_a_client_is_not_waited_for_longer_to_read_its_answer() -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(SEVEN.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
        driven.protocol.pause_writing()
        await driven.finish()  # the transport closes once the client has read
        assert driven.transport.is_closed

        await asyncio.wait_for(driven.transport.aborted.wait(), 10.0)

    drive(scenario, receive_timeout_s=0.1)


def test_a_client_that_hangs_up_gives_its_request_up() -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(SEVEN)
        driven.protocol.connection_lost(None)
        await turns()

        assert driven.whole.begun[0].is_given_up
        assert driven.transport.written == []

    drive(scenario)


@pytest.mark.parametrize("first", [SEVEN, SEVEN.replace(b"/infer", b"/slow")])
def test_a_client_that_hangs_up_is_gone_for_the_request_that_others_wait_for(
    first: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(first + SEVEN + SEVEN)
        driven.transport.is_broken = True
        driven.protocol.connection_lost(ConnectionResetError())
        driven.may_answer.set()
        await turns()

        assert [begun.is_given_up for begun in driven.whole.begun] == [True] * (first == SEVEN)
        assert [path for path, *_ in driven.asked] == ["/slow"] * (first != SEVEN)
        assert not driven.protocol.tasks

    drive(scenario)
    assert caplog.records == []


@pytest.mark.parametrize("outcome", [b"done", ValueError("wrong")])
def test_an_outcome_is_late_for_a_client_that_hung_up(
    outcome: bytes | Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(SEVEN + SEVEN)
        driven.transport.is_broken = True
        driven.protocol.connection_lost(ConnectionResetError())
        await driven.finish(outcome)

        assert driven.asked == []

    drive(scenario)
    assert caplog.records == []


def test_a_client_that_sends_no_more_counts_as_one_that_hung_up() -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(SEVEN)

        assert not driven.protocol.eof_received(), "the transport would stay open"

    drive(scenario)


@pytest.mark.parametrize(("http", "continues"), [(b"HTTP/1.1", True), (b"HTTP/1.0", False)])
def test_a_client_of_http_1_0_is_not_told_to_continue(http: bytes, continues: bool) -> None:
    async def scenario(driven: Driven) -> None:
        head = b"POST /usual %b\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n" % http
        await driven.receive(head)
        before = list(driven.transport.written)
        await driven.receive(b"ab")

        assert before == [b"HTTP/1.1 100 Continue\r\n\r\n"] * continues
        assert driven.asked == [("/usual", b"ab", None)]

    drive(scenario)


def test_requests_sent_ahead_are_answered_in_their_order() -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(SEVEN + SEVEN + SEVEN)
        assert (len(driven.whole.begun), driven.asked) == (1, [])
        await driven.finish()

        assert [path for path, *_ in driven.asked] == ["/infer"] * 2
        written = b"".join(driven.transport.written)
        assert written.index(b"done") < written.index(b"app")

    drive(scenario)


@pytest.mark.parametrize("http", [b"HTTP/1.1\r\nconnection: close", b"HTTP/1.0"])
def test_a_connection_that_is_not_kept_is_closed_after_the_answer(http: bytes) -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(SEVEN.replace(b"HTTP/1.1", http))
        assert not driven.transport.is_closed
        await driven.finish()

        assert b"\r\nconnection: close\r\n\r\ndone" in driven.transport.written[0]
        assert driven.transport.is_closed

    drive(scenario)


def test_a_server_that_leaves_ends_connections_with_their_next_answer() -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(SEVEN)
        await driven.finish()
        assert not driven.transport.is_closed
        driven.is_leaving = True
        await driven.receive(SEVEN)
        await driven.finish()

        assert b"\r\nconnection: close\r\n\r\ndone" in driven.transport.written[1]
        assert driven.transport.is_closed

    drive(scenario)


def padded(size: int) -> bytes:
    """Return a request whose head is of about so many bytes."""
    return HEAD + b"content-length: 0\r\nx-padding: " + b"1" * (size - 80) + b"\r\n\r\n"


@pytest.mark.parametrize("piece", [200_000, 30_000, 1_000])
def test_a_head_over_the_limit_is_refused_however_it_is_read(piece: int) -> None:
    async def scenario(driven: Driven) -> None:
        request = padded(HEAD_BYTES + 200)
        await driven.receive(*[request[i : i + piece] for i in range(0, len(request), piece)])

        assert driven.transport.is_closed
        assert (driven.whole.begun, driven.asked) == ([], [])
        check_refused(driven.transport.written, "the request's headers are over 64 KiB")

    drive(scenario)


@pytest.mark.parametrize("piece", [300_000, 150_000, 30_000])
def test_what_comes_before_a_head_is_not_counted_as_its(piece: int) -> None:
    async def scenario(driven: Driven) -> None:
        body = HEAD.replace(b"infer", b"usual") + b"content-length: 70000\r\n\r\n" + bytes(70_000)
        sent = body + 2 * padded(60_000).replace(b"infer", b"usual")
        await driven.receive(*[sent[i : i + piece] for i in range(0, len(sent), piece)])

        assert [path for path, *_ in driven.asked] == ["/usual"] * 3
        assert not driven.transport.is_closed

    drive(scenario)


def test_too_many_requests_ahead_end_the_connection() -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(SEVEN)
        await driven.receive((MOST_PIPELINED + 2) * (HEAD + b"content-length: 0\r\n\r\n"))

        assert driven.transport.written == []
        await driven.finish()
        await driven.receive(*[SEVEN] * MOST_PIPELINED)  # passed over

        assert [path for path, *_ in driven.asked] == ["/infer"] * MOST_PIPELINED
        assert driven.transport.is_closed
        check_refused(driven.transport.written, "over 64 requests wait on this connection")

    drive(scenario)


NOT_HTTP = [
    pytest.param(b"GARBAGE\r\n\r\n", id="no method"),
    pytest.param("POST /é HTTP/1.1\r\nhost: x\r\n\r\n".encode(), id="not ASCII"),
    pytest.param(
        HEAD.replace(b"infer", b"slow") + b"transfer-encoding: chunked\r\n\r\nno\r\n", id="no chunk"
    ),
    pytest.param(HEAD + b"content-length: 7\r\ncontent-length: 8\r\n\r\n", id="two lengths"),
]


@pytest.mark.parametrize("broken", NOT_HTTP)
def test_what_is_no_request_is_refused_with_a_problem(broken: bytes) -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(broken)

        assert driven.transport.is_closed
        assert len(driven.transport.written) == 1
        check_refused(driven.transport.written, "Invalid HTTP request received.")

    drive(scenario)


@pytest.mark.parametrize("broken", NOT_HTTP)
def test_what_came_before_is_answered_before_the_refusal(broken: bytes) -> None:
    async def scenario(driven: Driven) -> None:
        await driven.receive(SEVEN + SEVEN + broken)
        assert driven.transport.written == []
        await driven.finish()

        assert b"done" in driven.transport.written[0]
        assert [path for path, *_ in driven.asked] == ["/infer"]
        assert driven.transport.is_closed
        check_refused(driven.transport.written, "Invalid HTTP request received.")

    drive(scenario)


def test_an_answer_before_the_body_is_whole_leaves_the_connection_in_order() -> None:
    async def scenario(driven: Driven) -> None:
        head = HEAD.replace(b"infer", b"early") + b"transfer-encoding: chunked\r\n\r\n"
        await driven.receive(head, b"1\r\na\r\n0\r\n\r\n", b"GARBAGE\r\n\r\n")
        assert driven.transport.is_closed
        check_refused(driven.transport.written, "Invalid HTTP request received.")

    drive(scenario)


def test_a_body_that_breaks_after_its_answer_ends_the_connection() -> None:
    async def scenario(driven: Driven) -> None:
        head = HEAD.replace(b"infer", b"early") + b"transfer-encoding: chunked\r\n\r\n"
        await driven.receive(head, b"no\r\n")

        assert driven.transport.aborted.is_set()
        assert b"400" not in b"".join(driven.transport.written)

    drive(scenario)


def check_refused(written: list[bytes], why: str) -> None:
    head, _, body = written[-1].partition(b"\r\n\r\n")
    status, *headers = head.split(b"\r\n")
    assert status == b"HTTP/1.1 400 Bad Request"
    assert set(headers) == {
        b"content-type: application/problem+json",
        b"content-length: %d" % len(body),
        b"connection: close",
    }
    problem = json.loads(body)
    assert (problem["type"], problem["status"]) == ("urn:maestro:bad-request", 400)
    assert problem["error"] == problem["detail"] == why


def test_both_ways_answer_alike(tiny_artifact: Artifact, tmp_path: Path) -> None:
    """A body of chunks is the application's; the same with a length is not."""
    zeros = np.zeros(tiny_artifact.manifest.input.shape[1:]).tolist()
    bodies = [{"inputs": zeros}, {"inputs": zeros, "top_k": 2}, {"inputs": [1]}, {"wrong": 1}]
    paths = [b"/infer?point=1", b"/infer?point=99", b"/infer", b"/infer?x=1"]
    statuses = set()
    quick = {"MAESTRO_CALIBRATION_BUDGET_S": "1"}
    with running_server(tmp_path, tiny_artifact.path, **quick) as address:
        for path, content in zip(paths * 4, sorted(bodies * 4, key=str), strict=True):
            body = json.dumps(content).encode()
            begun = asked(address, path, b"content-length: %d\r\n\r\n%b" % (len(body), body))
            usual = asked(
                address,
                path,
                b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
            )

            assert begun == usual
            statuses.add(begun[0][:12])
        for coding in (
            b"content-encoding: br\r\ncontent-length: 2\r\n\r\n{}",
            b"transfer-encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        ):
            assert asked(address, b"/infer", coding)[0][9:12] == b"415"
    assert statuses == {b"HTTP/1.1 200", b"HTTP/1.1 422"}


def asked(address: str, path: bytes, rest: bytes) -> tuple[bytes, list[bytes], dict[str, Any]]:
    """Return status, names of headers and what is said but times."""
    host, _, port = address.removeprefix("http://").partition(":")
    head = b"POST %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    received = b""
    with socket.create_connection((host, int(port)), timeout=10) as connected:
        connected.sendall(head % path + rest)
        while data := connected.recv(65536):
            received += data
    top, _, body = received.partition(b"\r\n\r\n")
    status, *headers = top.split(b"\r\n")
    said = {name: value for name, value in json.loads(body).items() if not name.endswith("_ms")}
    return status, [header.partition(b":")[0] for header in headers], said
