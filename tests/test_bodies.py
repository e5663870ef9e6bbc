"""Bodies that arrive: one within its limit, all together within another, both given back."""

import asyncio
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import pytest
from fastapi import Request

from server.bodies import Bodies, Body
from server.errors import TooLargeError, UnavailableError, UnsupportedEncodingError

LARGEST, TOGETHER = 100, 250


def request(chunks: Iterable[bytes], announced: int | None = None) -> Request:
    """Return a request whose body comes in these chunks."""
    rest = iter([*chunks, None])
    headers = [] if announced is None else [(b"content-length", str(announced).encode())]

    async def receive() -> dict[str, Any]:
        chunk = next(rest)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


def read(body: Body, *chunks: bytes, announced: int | None = None) -> bytes:
    return asyncio.run(body.read(request(chunks, announced)))


def test_a_body_is_what_its_chunks_are() -> None:
    with Bodies(LARGEST, TOGETHER).one() as body:
        assert read(body, b"ab", b"", b"c") == b"abc"


def test_a_body_over_its_limit_is_refused_and_given_back() -> None:
    bodies = Bodies(LARGEST, TOGETHER)

    with pytest.raises(TooLargeError, match="over 100 bytes"), bodies.one() as body:
        read(body, bytes(60), bytes(41))
    with pytest.raises(TooLargeError), bodies.one() as body:
        read(body, announced=101)

    assert bodies.held_bytes == 0


@pytest.mark.parametrize("coding", ["gzip, chunked", "gzip", "chunked, chunked"])
def test_a_body_that_is_coded_for_its_way_is_refused(coding: str) -> None:
    coded = request([b"x"])
    coded.scope["headers"].append((b"transfer-encoding", coding.encode()))

    with (
        pytest.raises(UnsupportedEncodingError, match=f"^transfer-encoding '{coding}' is not"),
        Bodies(LARGEST, TOGETHER).one() as body,
    ):
        asyncio.run(body.read(coded))


def test_bodies_together_are_held_to_their_limit_until_they_are_given_back() -> None:
    bodies = Bodies(LARGEST, TOGETHER)
    with ExitStack() as under_way:
        for _ in range(2):
            read(under_way.enter_context(bodies.one()), bytes(100))
        with pytest.raises(UnavailableError) as refused, bodies.one() as third:
            read(third, bytes(50), bytes(1))
        with bodies.one() as small:
            assert len(read(small, bytes(50))) == 50

    assert refused.value.problem()["reason"] == "memory"
    assert bodies.held_bytes == 0


def test_what_is_announced_and_not_sent_keeps_nobody_out() -> None:
    bodies = Bodies(LARGEST, TOGETHER)
    with ExitStack() as silent:
        for _ in range(10):
            read(silent.enter_context(bodies.one()), announced=100)
        with bodies.one() as body:
            assert len(read(body, bytes(100))) == 100


def test_one_body_alone_is_taken_whatever_the_limit_together() -> None:
    with Bodies(LARGEST, 10).one() as body:
        assert len(read(body, bytes(60), bytes(40))) == 100
