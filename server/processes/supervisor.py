"""Starts the workers, replaces one that ends or hangs, and ends with all. No HTTP, no model."""

import asyncio
import logging
import math
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.effort import Progress
from server.processes import counters
from server.processes.channel import Channel, open_channel
from server.processes.hub import Hub
from server.processes.member import Place
from server.settings import Settings
from server.signals import REPEAT_S

log = logging.getLogger("maestro")

# A worker that ends so often before it could serve would only be started over and over.
_MOST_FAILURES = 3
# One that serves and ends within so long, again and again, is replaced later and later: a start
# takes a core for seconds, of those that the others serve on.
_SHORT_LIFE_S = 60.0
_LONGEST_PAUSE_S = 30.0
_LOOK_S = 5.0  # between two looks whether a worker hangs


class WorkersError(Exception):
    """The workers do not start; the message says why."""


@dataclass(slots=True)
class _Worker:
    process: Process
    talk: asyncio.Task[None]
    reason: str = ""  # why it could not start, in its own words


def supervise(
    settings: Settings,
    cores: Sequence[list[int]],
    listeners: Sequence[socket.socket],
    on_progress: Callable[[Progress], object],
) -> None:
    """Keep a worker on each group of cores until SIGTERM or SIGINT, then let all end.

    The signal goes to the workers, which drain as a server alone does; a second one kills them.
    One that follows at once is the first again.

    Raises:
        WorkersError: a worker ended again and again before it served, and no other serves.
    """
    with counters.made(settings.workers) as directory:
        asyncio.run(_run(settings, cores, listeners, directory, on_progress))


async def _run(
    settings: Settings,
    cores: Sequence[list[int]],
    listeners: Sequence[socket.socket],
    directory: Path,
    on_progress: Callable[[Progress], object],
) -> None:
    hub = Hub(settings, directory, on_progress)
    places = [
        Place(i, settings.workers, group, [s.fileno() for s in listeners], str(directory))
        for i, group in enumerate(cores)
    ]
    await _Supervisor(hub, listeners, _environment(settings)).run(places)


class _Supervisor:
    def __init__(
        self, hub: Hub, listeners: Sequence[socket.socket], environment: dict[str, str]
    ) -> None:
        self._hub, self._listeners, self._environment = hub, listeners, environment
        self._workers: dict[int, _Worker] = {}
        self._ending: signal.Signals | None = None
        self._ending_since_s = math.inf
        self._told_to_end = asyncio.Event()

    async def run(self, places: Sequence[Place]) -> None:
        """Keep a worker at each place until a signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        try:
            async with asyncio.TaskGroup() as group:
                for place in places:
                    group.create_task(self._keep(place))
        except* WorkersError as errors:
            raise errors.exceptions[0] from None
        finally:
            self._signal(signal.SIGKILL)
            await asyncio.gather(*(worker.process.wait() for worker in self._workers.values()))

    def _end(self, number: signal.Signals) -> None:
        """Have all workers end, and none started."""
        now = asyncio.get_running_loop().time()
        again = self._ending is not None
        if again and now - self._ending_since_s < REPEAT_S:
            return
        self._ending, self._ending_since_s = number, now
        self._told_to_end.set()
        for listener in self._listeners:  # else connections would wait for nobody
            listener.close()
        self._signal(signal.SIGKILL if again else number)

    def _signal(self, number: signal.Signals) -> None:
        for worker in self._workers.values():
            with suppress(ProcessLookupError):
                worker.process.send_signal(number)

    async def _keep(self, place: Place) -> None:
        failures = short_lives = 0
        clock = asyncio.get_running_loop().time
        while self._ending is None:
            began_s = clock()
            try:
                worker = await self._start(place)
            except OSError as error:
                failures += 1
                self._judge(place.index, f"it cannot be started: {error.strerror}", failures)
                await self._pause(pause_s(failures))
                continue
            watch = asyncio.create_task(self._watch(place.index, worker.process))
            status = await worker.process.wait()
            watch.cancel()
            await worker.talk  # what it said last
            served = self._hub.left(place.index) or status == 0  # told to end by somebody
            failures = 0 if served else failures + 1
            short = status != 0 and clock() - began_s < _SHORT_LIFE_S
            short_lives = short_lives + 1 if short else 0
            del self._workers[place.index]
            if self._ending is None:
                self._judge(place.index, worker.reason or _what(status), failures)
                await self._pause(pause_s(max(short_lives, failures)))

    async def _watch(self, index: int, process: Process) -> None:
        """Kill a worker that hangs: what it holds is lost, and what waits for it would wait on."""
        while await self._hub.answers(index):
            await asyncio.sleep(_LOOK_S)
        log.warning("worker %d hangs, and is killed", index)
        with suppress(ProcessLookupError):
            process.kill()

    async def _pause(self, seconds: float) -> None:
        """Wait so long, or until the workers are told to end."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._told_to_end.wait(), seconds)

    def _judge(self, index: int, why: str, failures: int) -> None:
        """Give up where a worker fails again and again, and none of the others serves."""
        if failures >= _MOST_FAILURES and not self._hub.serves:
            raise WorkersError(f"worker {index} ended {failures} times before it served: {why}")
        log.warning("worker %d ended, and is replaced: %s", index, why)

    async def _start(self, place: Place) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "server.processes.member"),
                place.text(theirs.fileno()),
                stdin=PIPE,  # ends with this process, whatever ends it: so does the worker then
                pass_fds=[theirs.fileno(), *place.listeners],
                process_group=0,  # a terminal's Ctrl-C is for this process alone
                env=self._environment,
            )
        talk = asyncio.create_task(self._talk(place.index, ours))
        worker = self._workers[place.index] = _Worker(process, talk)
        if self._ending is not None:
            process.send_signal(self._ending)
        return worker

    async def _talk(self, index: int, connection: socket.socket) -> None:
        async def answer(name: str, given: dict[str, Any]) -> Any:  # noqa: ANN401  any JSON
            if name == "why":
                self._workers[index].reason = given["reason"]
                return None
            return await self._hub.answer(index, channel, name, given)

        channel: Channel = await open_channel(connection, answer)
        await channel.run()


def pause_s(short_lives: int) -> float:
    """Return how long to wait before a worker is replaced after so many short lives in a row.

    The first is replaced at once.
    """
    return 0.0 if short_lives < 2 else min(_LONGEST_PAUSE_S, 2.0 ** (short_lives - 2))


def _environment(settings: Settings) -> dict[str, str]:
    """Return the environment in which a worker reads the same settings.

    The token is left as it is: it comes from the environment, and from nowhere else.
    """
    fields = settings.model_dump(mode="json", exclude={"admin_token"})
    return os.environ | {f"MAESTRO_{name.upper()}": str(value) for name, value in fields.items()}


def _what(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    return f"signal {signal.Signals(-status).name}"
