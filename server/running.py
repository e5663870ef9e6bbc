"""Runs the application until a signal: not ready at once, serving on for the drain, then an end."""

import asyncio
import contextlib
import logging
import math
import resource
import signal
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import uvicorn
import uvloop

from server.app import create_app
from server.connections import Limits, limited
from server.keep_warm import keep_warm
from server.processes.accepting import Acceptor, opened
from server.processes.counters import ACCEPTS_NONE
from server.promptness import forget_the_start
from server.service import Service
from server.signals import REPEAT_S
from server.statistics import Row

log = logging.getLogger("maestro")

# Between the end of accepting and the end of idle connections: a request that is on its way on a
# connection just accepted still arrives.
LINGER_S = 0.2

# Then what was taken has so long to be answered: a body that trickles in must not hold the end up.
GRACE_S = 10

# After a second signal, what was taken has so long to be answered.
STOP_S = 1.0

# Connections that may wait to be accepted. One that finds no room tries again a second later, so
# that a burst of new ones, after 40 ms in which nobody could accept, took a second.
BACKLOG = 1024
# At least so many, however few files a process may open: all are accepted at once, before those
# over the limit are closed, and each takes a file.
LEAST_BACKLOG = 128
OWN_FILES = 96


@dataclass(frozen=True, slots=True)
class Shared:
    """What a worker shares with others: how many connections each has.

    `connections[index]` are this one's.
    """

    connections: Row
    index: int

    def count(self, connections: int) -> None:
        """Say how many connections are open here, while any are accepted."""
        if self.connections[self.index] != ACCEPTS_NONE:
            self.connections[self.index] = connections


class _Server(uvicorn.Server):
    """uvicorn's server, leaving signals to us: its own handling ends with the signal's status."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def close(self, listeners: Iterable[socket.socket]) -> None:
        """Accept what waits at the listeners, and no more: to close them would break that off."""
        if not self.started:
            return
        waiting = [each for listener in listeners for each in _waiting(listener)]
        self._opening = [opened(connection, self._protocol) for connection in waiting]
        for server in self.servers:
            server.close()

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


class _Sharing(_Server):
    """A server that accepts from sockets that others accept from too."""

    def __init__(self, config: uvicorn.Config, shared: Shared) -> None:
        super().__init__(config)
        self._shared = shared

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        shared = self._shared
        acceptor = Acceptor(sockets or [], self._protocol, shared.connections, shared.index)
        self.servers.append(acceptor)  # type: ignore[arg-type]  # closed as the others are

    def close(self, _listeners: Iterable[socket.socket]) -> None:
        """Accept no more, as the acceptor does that."""
        super().close(())


def run(service: Service, listeners: list[socket.socket], shared: Shared | None = None) -> bool:
    """Serve until SIGTERM or SIGINT; return whether the server ever started.

    On SIGTERM readiness goes first, and requests are served on for `drain_s`, so that balancers
    have time to look elsewhere; SIGINT does not wait. A second signal ends connections too, but
    of one among several workers: those may be told to end by their supervisor and by others. One
    that follows at once is the first again: timeout(1) sends each twice.
    """
    settings = service.settings
    app = create_app(settings, service)
    max_connections, backlog = _places(settings.max_connections)
    limits = Limits(max_connections, settings.receive_timeout_s)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=GRACE_S,
        http=limited(  # type: ignore[arg-type]  # it calls it, whatever it is
            limits,
            getattr(app.state, "whole", None),
            shared.count if shared else lambda _: None,
            lambda: service.is_leaving,
        ),
        backlog=backlog,
    )
    server = _Sharing(config, shared) if shared else _Server(config)
    forget_the_start()
    with (
        contextlib.suppress(SystemExit),  # uvicorn's answer to a start that failed; it says so
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(server, service, listeners))
    return server.started


def _waiting(listener: socket.socket) -> Iterator[socket.socket]:
    """Yield the connections that wait to be accepted, at most as many as can at one time."""
    with contextlib.suppress(OSError):  # there are no more
        for _ in range(socket.SOMAXCONN):
            yield listener.accept()[0]


def _places(wanted: int) -> tuple[int, int]:
    """Return how many connections may be open, and how many may wait; asks for the files they take.

    Where the process gets too few, fewer may be open than wanted: with no file left none could be
    accepted, and none would be closed for it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = wanted + BACKLOG + OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < files:
        soft = files if hard == resource.RLIM_INFINITY else min(files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted, BACKLOG
    most = max(soft // 2, soft - LEAST_BACKLOG - OWN_FILES)
    if most < wanted:
        log.warning("%d connections at most, not %d: %d files may be open", most, wanted, soft)
    open_most = min(most, wanted)
    return open_most, max(LEAST_BACKLOG, min(BACKLOG, soft - open_most - OWN_FILES))


async def _serve(server: _Server, service: Service, listeners: list[socket.socket]) -> None:
    loop = asyncio.get_running_loop()
    told_s = math.inf

    def leave(drain_s: float) -> None:
        nonlocal told_s
        if not service.is_leaving:
            told_s = loop.time()
        elif loop.time() - told_s < REPEAT_S:
            return
        server.force_exit = service.is_leaving and not isinstance(server, _Sharing)
        service.leave(STOP_S if server.force_exit else None)
        loop.call_later(0.0 if server.force_exit else drain_s, close)

    def close() -> None:
        server.close(listeners)
        loop.call_later(LINGER_S, setattr, server, "should_exit", True)

    loop.add_signal_handler(signal.SIGTERM, leave, service.settings.drain_s)
    loop.add_signal_handler(signal.SIGINT, leave, 0.0)
    every_s = service.settings.keep_warm_ms / 1e3
    warming = asyncio.create_task(keep_warm(service, every_s)) if every_s else None
    await server.serve(listeners)
    if warming:
        warming.cancel()
    if server.force_exit:  # uvicorn left this out, and threads that compute must not outlive Python
        await server.lifespan.shutdown()
