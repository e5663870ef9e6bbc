"""Reading the bodies of requests: each within a limit, and all of them together within another."""

from types import TracebackType
from typing import Self

from fastapi import Request
from starlette.requests import ClientDisconnect

from server.errors import TooLargeError, UnavailableError, UnsupportedEncodingError


class Bodies:
    """What may be held of requests that are not answered yet.

    Only bytes that came count, not those announced: else a few clients that announce much and
    send nothing would keep all others out. One body alone is always taken.
    """

    def __init__(self, largest_bytes: int, together_bytes: int) -> None:
        self.largest_bytes, self.together_bytes = largest_bytes, together_bytes
        self.held_bytes = 0

    def one(self) -> "Body":
        """Return the body of one request, held while inside `with`."""
        return Body(self)


class Body:
    """One body; gives back its share of the memory at the end of `with`."""

    __slots__ = ("_all", "_bytes")

    def __init__(self, bodies: Bodies) -> None:
        self._all = bodies
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Give back all that is held."""
        self._all.held_bytes -= self._bytes
        self._bytes = 0

    async def read(self, request: Request) -> bytes:
        """Return the body. One that is refused is not read to its end.

        Raises:
            UnsupportedEncodingError: it is coded.
            TooLargeError: it is larger than a body may be.
            UnavailableError: with those of others it is more than may be held.
            ClientDisconnect: the client hung up.
        """
        for name, declared in request.scope["headers"]:
            if name == b"content-length" and declared.isdigit():
                self._check(int(declared[:20]))
            elif name == b"content-encoding":
                _check_encoding("content-encoding", declared, {"", "identity"})
            elif name == b"transfer-encoding":
                _check_encoding("transfer-encoding", declared, {"chunked"})
        parts, more = [], True
        while more:  # not request.stream(): a generator takes longer
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk, more = message.get("body", b""), message.get("more_body", False)
            self.hold(len(chunk))
            parts.append(chunk)
        return b"".join(parts)

    def _check(self, size: int) -> None:
        limit = self._all.largest_bytes
        if size > limit:
            raise TooLargeError(f"the body is over {limit} bytes", limit_bytes=limit)

    def hold(self, size: int) -> None:
        """Take so much more of the memory.

        Raises:
            TooLargeError, UnavailableError: as `read`.
        """
        bodies = self._all
        self._check(self._bytes + size)
        alone = bodies.held_bytes == self._bytes
        if not alone and bodies.held_bytes + size > bodies.together_bytes:
            raise UnavailableError(
                f"requests under way hold {bodies.held_bytes} of {bodies.together_bytes} bytes",
                reason="memory",
            )
        self._bytes += size
        bodies.held_bytes += size


def _check_encoding(header: str, declared: bytes, served: set[str]) -> None:
    encoding = declared.decode("latin-1").strip()
    if encoding.lower() not in served:
        raise UnsupportedEncodingError(header, encoding)
