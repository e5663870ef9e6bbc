"""One worker's process: `python -m server.processes.member PLACE`. Started by the supervisor."""

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# Nothing is imported here that makes threads: they would run on the cores of all workers.

# After the supervisor: enough to answer what was taken.
_END_S = 15.0


@dataclass(frozen=True, slots=True)
class Place:
    """What one worker is given: its number, its cores, file descriptors, where it counts."""

    index: int
    workers: int
    cores: list[int]
    listeners: list[int]
    directory: str

    def text(self, control: int) -> str:
        """Return this, and the descriptor of the supervisor's channel, as an argument."""
        return json.dumps({"place": asdict(self), "control": control})


def main() -> None:
    """Serve until told to end."""
    given = json.loads(sys.argv[1])
    place, control = Place(**given["place"]), socket.socket(fileno=given["control"])
    threading.Thread(target=_end_with_supervisor, args=(place,), daemon=True).start()
    if place.cores:
        os.sched_setaffinity(0, place.cores)
    try:
        _serve(place, control)
    except KeyboardInterrupt:
        sys.exit(130)


def _serve(place: Place, control: socket.socket) -> None:
    from server import logs, running, tracing
    from server.errors import ServiceError
    from server.processes import counters
    from server.processes.channel import say
    from server.processes.team import Team
    from server.service import Service
    from server.settings import read_settings
    from server.statistics import Statistics

    directory = Path(place.directory)
    counters.count_as(place.index, directory)
    board = counters.Board(directory, place.workers)
    try:
        settings = read_settings()
        logs.set_up(settings.log_format, place.index)
        tracing.export_spans("maestro")
        statistics = Statistics(board.statistics[place.index], board.statistics)
        service = Service(settings, team=Team(place.workers, control, statistics))
    except (ServiceError, ValueError, OSError) as error:
        say(control, "why", reason=str(error))
        sys.exit(1)
    sockets = [socket.socket(fileno=number) for number in place.listeners]
    shared = running.Shared(board.connections, place.index)
    if not running.run(service, sockets, shared):
        sys.exit(1)


def _end_with_supervisor(place: Place) -> None:
    """Wait for the supervisor to end, however it does; then clear up, and end as at Ctrl-C."""
    os.read(0, 1)  # nothing is ever written there
    shutil.rmtree(place.directory, ignore_errors=True)  # what is mapped stays usable
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_END_S)
    os._exit(1)


if __name__ == "__main__":
    main()
