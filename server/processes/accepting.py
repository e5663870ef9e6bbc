"""Which worker takes a connection that waits at a shared socket: one that has no more than others.

All workers that are idle wake up for it, and the first to accept has it for as long as the client
keeps it open. Left to chance, one worker would hold most of few connections, as a balancer has.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from server.processes.counters import ACCEPTS_NONE
from server.statistics import Row

# A worker that is ahead leaves a connection to the others for so long; if they compute, it helps.
_YIELD_S = 0.001
# After a failure to accept, as when the process has all files open that it may.
_PAUSE_S = 1.0


class Acceptor:
    """Takes connections from sockets that other workers accept from too, one at a time.

    Stands in for the servers that uvicorn closes. `connections` has the open connections of each
    worker; this one's are `connections[index]`.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        protocol: Callable[[], asyncio.Protocol],
        connections: Row,
        index: int,
    ) -> None:
        self._sockets, self._protocol = sockets, protocol
        self._connections, self._index = connections, index
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[object]] = set()
        self._is_closed = False
        connections[index] = 0
        for each in sockets:
            self._watch(each)

    def close(self) -> None:
        """Accept what waits already, and no more; the other workers do."""
        if self._is_closed:
            return
        self._is_closed = True
        for each in self._sockets:
            for _ in range(socket.SOMAXCONN):  # at most as many as can wait at one time
                if not self._accept(each):
                    break
        self._connections[self._index] = ACCEPTS_NONE
        for each in self._sockets:
            self._loop.remove_reader(each)
            each.close()

    async def wait_closed(self) -> None:
        """Wait for connections that were accepted and are being opened."""
        await asyncio.gather(*self._opening, return_exceptions=True)

    def _watch(self, listener: socket.socket) -> None:
        if not self._is_closed:
            self._loop.add_reader(listener, self._woken, listener)

    def _woken(self, listener: socket.socket) -> None:
        if is_ahead(self._connections, self._index):
            self._loop.remove_reader(listener)
            self._loop.call_later(_YIELD_S, self._help, listener)
        else:
            self._accept(listener)

    def _help(self, listener: socket.socket) -> None:
        if not self._is_closed:
            self._watch(listener)
            self._accept(listener)

    def _accept(self, listener: socket.socket) -> bool:
        """Return whether a connection was accepted."""
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False  # another worker was first, or the client is gone
        except OSError:
            self._loop.remove_reader(listener)
            self._loop.call_later(_PAUSE_S, self._watch, listener)
            return False
        self._connections[self._index] += 1
        opening = opened(connection, self._protocol)
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)
        return True


def opened(
    connection: socket.socket, protocol: Callable[[], asyncio.Protocol]
) -> asyncio.Task[object]:
    """Return the task that hands an accepted connection to the event loop."""
    connection.setblocking(False)
    with suppress(OSError):  # gone already
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    loop = asyncio.get_running_loop()
    opening = loop.create_task(loop.connect_accepted_socket(protocol, connection))
    opening.add_done_callback(_ended)
    return opening


def _ended(opening: asyncio.Task[object]) -> None:
    if not opening.cancelled():
        opening.exception()  # the client is gone: nobody to tell


def is_ahead(connections: Row, index: int) -> bool:
    """Return whether a worker has more connections than another that accepts some."""
    least = min((n for n in connections if n != ACCEPTS_NONE), default=0)
    return connections[index] > least
