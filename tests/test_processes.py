"""What several workers are made of: cores, counters, the channel, who accepts, who measures."""

import asyncio
import fcntl
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.effort import QUICK, CancelledError, Effort
from maestro_core.host import usable_cores
from maestro_core.locking import locked
from maestro_core.profile import Profile
from maestro_core.profile_store import ProfileStore
from server import listening
from server.answers import Inference
from server.processes import cores, counters
from server.processes.accepting import Acceptor, is_ahead
from server.processes.channel import Answer, Channel, LostError, RemoteError, open_channel
from server.processes.counters import ACCEPTS_NONE, Board
from server.processes.hub import Hub
from server.processes.supervisor import WorkersError, _Supervisor, pause_s
from server.processes.team import Hands, Team
from server.settings import read_settings
from server.statistics import Statistics, private_row
from tests.test_profile import PROFILE

ANSWERED = Inference(np.zeros((2, 10), np.float32), 3, 1.0, 2.0, 4.0, 2)
COUNTING = """
import sys
from pathlib import Path
from server.processes import counters
counters.count_as(int(sys.argv[2]), Path(sys.argv[1]))
from server.metrics import Metrics
metrics = Metrics()
for _ in range(int(sys.argv[3])):
    metrics.refused("unavailable")
metrics.queue_depth.set(int(sys.argv[3]))
metrics.slowdown.set(int(sys.argv[3]))
metrics.ready.set(int(sys.argv[2]))
"""


# -- cores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "workers", "groups"),
    [
        ([0, 4, 1, 5], 2, [[0, 4], [1, 5]]),
        ([0, 1, 2, 3, 4], 2, [[0, 1], [2, 3]]),
        ([3, 7, 9], 3, [[3], [7], [9]]),
    ],
)
def test_each_worker_has_as_many_cores_and_none_of_anothers(
    given: list[int], workers: int, groups: list[list[int]]
) -> None:
    assert cores.split(given, workers) == groups


def test_more_workers_than_cores_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match=f"this process may use {usable_cores()}$"):
        cores.groups(usable_cores() + 1)


class Greeter(asyncio.Protocol):
    """Says hello to whoever connects."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(b"hello")
        transport.close()


# -- accepting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("connections", "ahead"),
    [([0, 0], False), ([1, 0], True), ([1, 2], False), ([1, ACCEPTS_NONE], False)],
)
def test_a_worker_is_ahead_of_others_that_accept(connections: list[int], ahead: bool) -> None:
    row = memoryview(np.array(connections, np.int64).tobytes()).cast("B").cast("q")

    assert is_ahead(row, 0) is ahead


def test_a_connection_that_waits_is_taken_before_the_socket_closes() -> None:
    async def main() -> bytes:
        row = memoryview(bytearray(8)).cast("q")
        with listening.listen("127.0.0.1", 0)[0] as listener:
            acceptor = Acceptor([listener], Greeter, row, 0)
            with socket.create_connection(listener.getsockname(), 10.0) as client:
                acceptor.close()
                await acceptor.wait_closed()
                return client.recv(5)

    assert asyncio.run(main()) == b"hello"


def test_all_addresses_of_a_host_listen_on_one_port() -> None:
    sockets = listening.listen("localhost", 0)
    try:
        assert len({each.getsockname()[1] for each in sockets}) == 1
        with pytest.raises(OSError, match="in use"):
            listening.listen("localhost", sockets[0].getsockname()[1])
    finally:
        for each in sockets:
            each.close()


def test_a_name_whose_other_address_is_not_this_machines_is_listened_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere, here = "192.0.2.1", "127.0.0.1"  # RFC 5737: nobody's
    found = {"both": [elsewhere, here], "one": [elsewhere]}
    monkeypatch.setattr(
        "socket.getaddrinfo",
        lambda host, port, **_: [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found[host]
        ],
    )

    (listener,) = listening.listen("both", 0)
    with listener:
        assert listener.getsockname()[0] == here
    with pytest.raises(OSError, match="assign requested address"):
        listening.listen("one", 0)


# -- counters ------------------------------------------------------------------------------------


def count(directory: Path, worker: int, times: int) -> None:
    """Count in a process of its own, which ends without a word, as one that is killed."""
    arguments = [str(directory), str(worker), str(times)]
    subprocess.run([sys.executable, "-c", COUNTING, *arguments], check=True)


def samples(directory: Path) -> dict[str, float]:
    text = counters.totals(directory).decode()
    families = text_string_to_metric_families(text)
    return {s.name: s.value for family in families for s in family.samples if "le" not in s.labels}


def test_a_worker_that_ends_again_and_again_is_replaced_later_and_later() -> None:
    pauses_s = [pause_s(short_lives) for short_lives in range(12)]

    assert pauses_s[:5] == [0, 0, 1, 2, 4]
    assert pauses_s[-1] == pauses_s[-2] == 30


def test_counts_add_up_outlive_a_worker_and_go_on_with_the_next() -> None:
    with counters.made(2) as directory:
        count(directory, 0, 3)
        count(directory, 1, 4)
        both = samples(directory)
        counters.forget_gauges(1, directory)
        one_less = samples(directory)
        count(directory, 1, 5)
        replaced = samples(directory)

    name = "maestro_requests_total"
    assert [found[name] for found in (both, one_less, replaced)] == [7, 7, 12]
    depths = [found["maestro_queue_depth"] for found in (both, one_less, replaced)]
    assert depths == [7, 3, 8]
    assert [found["maestro_slowdown"] for found in (both, one_less)] == [4, 3]
    assert both["maestro_ready"] == 0
    assert not directory.exists()


def test_statistics_are_those_of_all_workers() -> None:
    with counters.made(3) as directory:
        boards = [Board(directory, 3) for _ in range(3)]
        each = [Statistics(board.statistics[i], board.statistics) for i, board in enumerate(boards)]
        for statistics in each[:2]:
            statistics.answered([(ANSWERED, 8.0, None)])
            statistics.ran(2, 4.0)
        each[2].failed()

        answers = [statistics.answer("m", "1") for statistics in each]
        assert answers[0] == answers[1] == answers[2]
        (found,) = answers[0]["model_stats"]
    assert (found["inference_count"], found["execution_count"]) == (4, 2)
    assert found["inference_stats"]["success"] == {"count": 2, "ns": 16_000_000}
    assert found["inference_stats"]["fail"] == {"count": 1, "ns": 0}
    (batch,) = found["batch_stats"]
    assert (batch["batch_size"], batch["compute_infer"]) == (2, {"count": 2, "ns": 8_000_000})
    assert found["last_inference"] > 0


# -- the lock ------------------------------------------------------------------------------------


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from maestro_core.locking import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "made")], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (tmp_path / "made.lock").open("w") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder.kill()

    with locked(tmp_path / "made"):
        pass


# -- the channel ---------------------------------------------------------------------------------


async def ends(answer: Answer) -> tuple[Channel, Channel, list[asyncio.Task[None]]]:
    """Return both ends of a channel, of which the second answers, and what runs them."""

    async def nothing(name: str, given: dict[str, Any]) -> None: ...

    one, other = socket.socketpair()
    caller, answering = await open_channel(one, nothing), await open_channel(other, answer)
    return caller, answering, [asyncio.create_task(end.run()) for end in (caller, answering)]


def test_calls_are_answered_each_in_its_own_time() -> None:
    async def run() -> None:
        let_go = asyncio.Event()

        async def answer(name: str, given: dict[str, Any]) -> Any:
            if name == "slow":
                await let_go.wait()
            if name == "wrong":
                raise ValueError("no such thing")
            return [name, given]

        caller, _answering, _tasks = await ends(answer)
        slow = asyncio.create_task(caller.call("slow"))

        assert await caller.call("fast", text="\n" * 100_000) == ["fast", {"text": "\n" * 100_000}]
        with pytest.raises(RemoteError, match="ValueError: no such thing"):
            await caller.call("wrong")
        let_go.set()
        assert await slow == ["slow", {}]

    asyncio.run(run())


def test_a_call_to_a_process_that_ends_is_lost_at_once() -> None:
    async def run() -> None:
        async def answer(_name: str, _given: dict[str, Any]) -> Any:
            answering_task.cancel()
            await asyncio.Event().wait()

        caller, _answering, (_, answering_task) = await ends(answer)

        with pytest.raises(LostError):
            await caller.call("die")
        with pytest.raises(LostError):
            await caller.call("anything")

    asyncio.run(run())


# -- the hub -------------------------------------------------------------------------------------


class FakeWorker:
    """A worker of two that notes what it is told, and measures until it is let go."""

    def __init__(self, hub: Hub, index: int) -> None:
        self.hub, self.index = hub, index
        self.told: list[str] = []
        self.let_go = asyncio.Event()
        self.profile: str | None = PROFILE.to_json()
        self.can_use = True
        self.ended: list[dict[str, Any]] = []

    async def join(self, stored: str | None = None) -> Any:
        ours, self.theirs = socket.socketpair()

        async def of_hub(name: str, given: dict[str, Any]) -> Any:
            return await self.hub.answer(self.index, channel, name, given)

        channel = await open_channel(self.theirs, of_hub)
        self.channel = await open_channel(ours, self._answer)
        self.tasks = [asyncio.create_task(end.run()) for end in (channel, self.channel)]
        return await self.channel.call("join", profile=stored)

    def die(self) -> None:
        self.lose()
        self.hub.left(self.index)

    def lose(self) -> None:
        """End as far as its socket goes; its process takes longer."""
        self.tasks[1].cancel()

    async def _answer(self, name: str, given: dict[str, Any]) -> Any:
        if name != "beat":
            self.told.append(name)
        if name == "use" and not self.can_use:
            raise ValueError("no room")
        if name == "ended":
            self.ended.append(given)
        if name == "stop":
            self.profile = None if "measure" in self.told else self.profile
            self.let_go.set()
        if name == "measure":
            await self.let_go.wait()
            return self.profile
        return None


def with_hub(run: Callable[[Hub], Awaitable[None]], tmp_path: Path) -> None:
    async def inside() -> None:
        settings = read_settings(workers=2, state_dir=tmp_path)
        with counters.made(2) as directory:
            await run(Hub(settings, directory, lambda _: None))

    asyncio.run(inside())


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.001)


def test_one_measures_while_the_other_loads_and_both_use_what_is_stored(tmp_path: Path) -> None:
    async def run(hub: Hub) -> None:
        one, other = FakeWorker(hub, 0), FakeWorker(hub, 1)
        assert await one.join() is None
        assert one.told == [], "it measured before the other ran"
        assert await other.join() is None
        await until(lambda: one.told == ["measure"] and other.told == ["load"])
        one.let_go.set()
        await until(lambda: "use" in one.told and other.told == ["load", "stop", "use"])
        late = FakeWorker(hub, 1)

        assert await late.join() == {"profile": PROFILE.to_json(), "source": "measured"}
        await until(lambda: ProfileStore(tmp_path).find(PROFILE.key).profile == PROFILE)

    with_hub(run, tmp_path)


def test_a_stored_profile_is_given_to_all(tmp_path: Path) -> None:
    async def run(hub: Hub) -> None:
        one, other = FakeWorker(hub, 0), FakeWorker(hub, 1)
        assert await one.join() is None

        given = {"profile": PROFILE.to_json(), "source": "stored"}
        assert await other.join(PROFILE.to_json()) == given
        await until(lambda: one.told == ["use"])
        assert other.told == []

    with_hub(run, tmp_path)


def test_a_first_calibration_that_loses_its_worker_is_begun_again(tmp_path: Path) -> None:
    async def run(hub: Hub) -> None:
        one, other = FakeWorker(hub, 0), FakeWorker(hub, 1)
        await one.join()
        await other.join()
        await until(lambda: one.told == ["measure"])
        one.die()
        await until(lambda: other.told == ["load", "ended", "stop"])
        assert other.ended[0]["error"] == "LostError: worker 0, which measured, has ended"
        again = FakeWorker(hub, 0)
        await again.join()

        await until(lambda: again.told == ["measure"] and other.told[-1] == "load")
        again.let_go.set()
        await until(lambda: "use" in again.told and "use" in other.told)

    with_hub(run, tmp_path)


def test_a_calibration_is_not_begun_with_a_worker_that_is_ending(tmp_path: Path) -> None:
    async def run(hub: Hub) -> None:
        one, other = FakeWorker(hub, 0), FakeWorker(hub, 1)
        await one.join()
        await other.join()
        await until(lambda: one.told == ["measure"])
        one.lose()
        await until(lambda: other.told == ["load", "ended", "stop"])
        await asyncio.sleep(0.2)
        assert other.told == ["load", "ended", "stop"], "it began again with one that is lost"
        hub.left(0)
        again = FakeWorker(hub, 0)
        await again.join()

        await until(lambda: again.told == ["measure"])
        again.let_go.set()
        await until(lambda: "use" in again.told and "use" in other.told)

    with_hub(run, tmp_path)


def test_a_first_calibration_that_loses_one_who_loads_is_begun_again(tmp_path: Path) -> None:
    async def run(hub: Hub) -> None:
        one, other = FakeWorker(hub, 0), FakeWorker(hub, 1)
        await one.join()
        await other.join()
        await until(lambda: one.told == ["measure"])
        other.die()
        again = FakeWorker(hub, 1)
        assert await again.join() is None
        one.let_go.set()

        await until(lambda: "use" in one.told and "use" in again.told)
        assert one.ended[0]["error"] == "LostError: worker 1 ended while worker 0 measured"
        assert one.told == ["measure", "ended", "measure", "use"]

    with_hub(run, tmp_path)


def test_a_calibration_fails_where_one_who_is_to_load_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.processes.hub._HUNG_S", 0.1)

    async def run(hub: Hub) -> None:
        one, other = FakeWorker(hub, 0), FakeWorker(hub, 1)
        await one.join()
        await other.join()
        await until(lambda: one.told == ["measure"])
        monkeypatch.setattr(other.channel, "_take", lambda _message: None)
        one.let_go.set()

        await until(lambda: bool(one.ended))
        assert one.ended[0]["error"].startswith("TimeoutError: worker 1 hangs")
        assert one.told == ["measure", "ended"], "it began again with one that hangs"

    with_hub(run, tmp_path)


def test_a_calibration_is_known_to_all_and_ends_when_any_says_so(tmp_path: Path) -> None:
    async def run(hub: Hub) -> None:
        one, other = FakeWorker(hub, 0), FakeWorker(hub, 1)
        await one.join(PROFILE.to_json())
        await other.join()
        effort = asdict(QUICK)
        started, job = await other.channel.call("calibrate", effort=effort)
        assert started
        assert await one.channel.call("calibrate", effort=effort) == [False, job]
        await until(lambda: other.told == ["measure"] and one.told == ["load"])
        other.channel.tell("progress", done=3, total=9, left_s=1.5)
        while (await one.channel.call("job", job=job["id"]))["done"] != 3:
            await asyncio.sleep(0)
        await one.channel.call("cancel", job=job["id"])

        while (await one.channel.call("job", job=job["id"]))["state"] != "cancelled":
            await asyncio.sleep(0)
        assert await one.channel.call("job", job="none") is None
        assert "use" not in one.told + other.told

    with_hub(run, tmp_path)


def test_a_worker_whose_event_loop_stands_still_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.processes.hub._HUNG_S", 0.1)

    async def run(hub: Hub) -> None:
        well, hung = FakeWorker(hub, 0), FakeWorker(hub, 1)
        assert await hub.answers(0), "it has not joined yet"
        await well.join()
        await hung.join()
        monkeypatch.setattr(hung.channel, "_take", lambda _message: None)
        assert await hub.answers(1), "it does not serve yet"
        hub._board.connections[0] = hub._board.connections[1] = 0

        assert await hub.answers(0)
        assert not await hub.answers(1)
        hung.die()
        assert await hub.answers(1), "it has ended"

    with_hub(run, tmp_path)


def test_a_profile_that_a_worker_cannot_use_fails_the_calibration_for_all(tmp_path: Path) -> None:
    async def run(hub: Hub) -> None:
        one, other = FakeWorker(hub, 0), FakeWorker(hub, 1)
        other.can_use = False
        await one.join()
        await other.join()
        await until(lambda: one.told == ["measure"])
        one.let_go.set()

        await until(lambda: bool(one.ended and other.ended))
        (ended,) = one.ended
        assert other.ended == [ended]
        assert (ended["state"], ended["error"]) == ("failed", "RemoteError: ValueError: no room")
        while (await one.channel.call("job", job=ended["id"]))["state"] != "failed":
            await asyncio.sleep(0)

    with_hub(run, tmp_path)


@asynccontextmanager
async def joined(load: Callable[..., Profile]) -> AsyncIterator[tuple[Team, Channel]]:
    """Yield the team of one of two workers, which measures by `load`, and the hub's end of it."""

    async def take(_profile: Profile, _source: str) -> None: ...

    async def of_team(_name: str, _given: dict[str, Any]) -> None: ...

    ours, theirs = socket.socketpair()
    row = private_row()
    team = Team(2, theirs, Statistics(row, [row]))
    team.join(Hands(load, load, take, lambda: None))
    channel = await open_channel(ours, of_team)
    reading = asyncio.create_task(channel.run())
    try:
        yield team, channel
    finally:
        reading.cancel()


def test_a_worker_that_is_told_to_load_twice_ends_both_when_told_to_stop() -> None:
    running, begun, over = set[object](), list[object](), Event()

    def load(_effort: Effort, _progress: object, cancelled: Callable[[], bool]) -> Profile:
        me = object()
        running.add(me)
        begun.append(me)
        while not (cancelled() or over.wait(0.001)):
            pass
        running.remove(me)
        raise CancelledError

    async def run() -> None:
        async with joined(load) as (team, channel):
            assert await team.first(None, QUICK) is None
            channel.tell("load", job="a", effort=asdict(QUICK))
            await until(lambda: len(begun) == 1)
            channel.tell("load", job="a", effort=asdict(QUICK))
            await until(lambda: len(begun) == 2)
            channel.tell("stop")

            try:
                await until(lambda: not running)
            finally:
                over.set()

    asyncio.run(run())


def test_a_worker_that_is_ending_begins_no_calibration() -> None:
    over = Event()

    def load(_effort: Effort, _progress: object, cancelled: Callable[[], bool]) -> Profile:
        while not (cancelled() or over.wait(0.001)):
            pass
        raise CancelledError

    async def run() -> None:
        async with joined(load) as (team, channel):
            await team.first(None, QUICK)
            await team.close()

            try:
                async with asyncio.timeout(10):
                    assert await channel.call("load", job="a", effort=asdict(QUICK)) is None
                    assert await channel.call("measure", job="b", effort=asdict(QUICK)) is None
            finally:
                over.set()

    asyncio.run(run())


def test_a_worker_that_cannot_be_replaced_does_not_end_those_that_serve() -> None:
    hub: Any = SimpleNamespace(serves=True)
    supervisor = _Supervisor(hub, [], {})
    supervisor._judge(0, "no such file", failures=5)

    hub.serves = False
    with pytest.raises(WorkersError, match="worker 0 ended 5 times before it served: no such file"):
        supervisor._judge(0, "no such file", failures=5)


def test_a_worker_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.processes.supervisor._LOOK_S", 0.01)
    looks = iter([True, True, False])

    async def answers(_index: int) -> bool:
        return next(looks)

    async def main() -> int:
        hub: Any = SimpleNamespace(answers=answers)
        process = await asyncio.create_subprocess_exec("sleep", "60")
        await _Supervisor(hub, [], {})._watch(0, process)
        return await process.wait()

    assert asyncio.run(main()) == -signal.SIGKILL
