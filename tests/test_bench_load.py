"""Requests at their times over HTTP, and live servers beside the simulator."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from benchmarks import load, own_server
from benchmarks.open_loop import Sent, send_all
from maestro_core.artifact import Artifact

ANSWER = {"total_ms": 1.0, "compute_ms": 0.5, "predicted_ms": 0.7}
ANSWER |= {"batch_size": 2, "point": 3, "accuracy": 0.9}
Handler = Callable[[web.Request], Awaitable[web.Response]]


def sent_to(
    handler: Handler,
    arrivals_s: list[float],
    resting: Callable[[int], None] = lambda _sent: None,
) -> list[Sent]:
    """Return what becomes of requests with a target of 10 ms at a server with one handler."""

    async def run() -> list[Sent]:
        app = web.Application()
        app.router.add_post("/infer", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            url = f"http://127.0.0.1:{port}/infer"
            targets_ms = [10.0] * len(arrivals_s)
            return await send_all(url, b"x", "text/plain", arrivals_s, targets_ms, resting)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_requests_go_out_at_their_times_whatever_the_answers_take() -> None:
    async def slow(request: web.Request) -> web.Response:
        assert request.headers["x-max-latency-ms"] == "10.0000"
        await asyncio.sleep(0.1)
        return web.json_response(ANSWER)

    sent = sent_to(slow, [0.0, 0.01, 0.02, 0.03])

    assert all(one.late_ms < 50 for one in sent), "one waited for the answer before it"
    assert all(100 < one.latency_ms < 300 for one in sent)
    said = {(s.status, s.server_ms, s.compute_ms, s.predicted_ms) for s in sent}
    assert said == {(200, 1.0, 0.5, 0.7)}
    assert {(s.rows, s.point, s.accuracy) for s in sent} == {(2, 3, 0.9)}


def test_the_sender_rests_where_all_is_answered_and_it_waits_for_an_arrival() -> None:
    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(0.05)
        return web.json_response(ANSWER)

    rests: list[int] = []

    sent_to(slow, [0.01, 0.02, 0.3, 0.3, 0.6], rests.append)

    assert rests == [0, 2, 4], "not before the second: the first is under way"


def test_latency_counts_from_when_a_request_should_have_been_sent() -> None:
    import time

    async def blocking(_: web.Request) -> web.Response:
        time.sleep(0.05)  # it holds up the generator too, which runs here
        return web.json_response(ANSWER)

    sent = sent_to(blocking, [0.0, 0.02, 0.04, 0.06])

    assert max(one.late_ms for one in sent) > 15
    assert all(one.latency_ms > one.late_ms for one in sent)
    assert max(one.latency_ms for one in sent) > 130


def test_a_refused_request_has_a_status_and_no_latency() -> None:
    async def refusing(_: web.Request) -> web.Response:
        return web.json_response({"error": "full"}, status=503)

    (one,) = sent_to(refusing, [0.0])

    assert one.status == 503
    assert math.isnan(one.latency_ms)


def test_a_request_whose_connection_breaks_was_sent_when_it_was_written() -> None:
    async def breaking(request: web.Request) -> web.Response:
        await asyncio.sleep(0.3)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    (one,) = sent_to(breaking, [0.0])

    assert one.status == 0
    assert one.late_ms < 200


def test_a_server_that_is_not_there_is_an_error() -> None:
    async def run() -> list[Sent]:
        return await send_all("http://127.0.0.1:9/infer", b"", "text/plain", [0.0], [1.0])

    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        asyncio.run(run())


def test_a_server_that_does_not_start_says_why(tiny_artifact: Artifact, tmp_path: Path) -> None:
    wrong = "no such policy"

    with (
        pytest.raises(ChildProcessError, match="no such policy"),
        own_server.server(tiny_artifact, tmp_path, wrong, os.sched_getaffinity(0)),
    ):
        pass


def test_a_server_is_the_installed_one_whatever_directory_it_starts_in(
    tiny_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "maestro_core.py").write_text("raise SystemExit('another program')")
    monkeypatch.chdir(tmp_path)

    with (
        pytest.raises(ChildProcessError) as caught,
        own_server.server(tiny_artifact, tmp_path, "no such policy", os.sched_getaffinity(0)),
    ):
        pass

    assert "another program" not in str(caught.value)


def test_a_policy_that_met_no_target_has_no_accuracy_in_the_picture() -> None:
    known = {"met": (0.9, 0.0), "accuracy": (0.8, 0.0)}
    unknown = {"met": (0.0, 0.0), "accuracy": None}
    rows = [
        {"policy": "largest", "live": unknown, "simulated": unknown},
        {"policy": "smallest", "live": known, "simulated": known},
    ]

    met, accuracy = load.picture(rows).axes

    found = [
        [np.asarray(line.get_xydata()).tolist() for line in a.lines[:2]] for a in (met, accuracy)
    ]
    assert found == [[[[0, 0]], [[90, 90]]], [[], [[80, 80]]]]


def measuring(pid: int) -> list[int]:
    """Return the children of a process that have loaded a runtime."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    maps = {int(one): Path(f"/proc/{one}/maps").read_text(encoding="utf-8") for one in children}
    return [one for one, mapped in maps.items() if "onnxruntime" in mapped]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Take SIGINT as Python does by itself, also where a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_while_a_process_starts_waits_until_it_can_be_ended() -> None:
    ended: list[own_server.Process] = []

    def start() -> own_server.Process:
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        signal.raise_signal(signal.SIGINT)  # as if it came before anybody has the process
        return process

    def end(process: own_server.Process) -> None:
        process.communicate(b"\n")
        ended.append(process)

    with pytest.raises(KeyboardInterrupt), own_server.ending(start, end):
        pytest.fail("it went on")

    assert [process.returncode for process in ended] == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_nothing_is_ended_that_did_not_start() -> None:
    def fails() -> own_server.Process:
        raise OSError("no such program")

    with (
        pytest.raises(OSError, match="no such"),
        own_server.ending(fails, lambda _: pytest.fail("ended")),
    ):
        pass

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("signalled", [signal.SIGINT, signal.SIGTERM])
def test_what_a_bench_started_ends_with_it(tiny_artifact: Artifact, signalled: int) -> None:
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{heard}; from maestro_core.cli import main; main()"
    command = [sys.executable, "-c", program, "bench", "load", str(tiny_artifact.path), "--quick"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as bench:
        while not (started := measuring(bench.pid)):
            assert bench.poll() is None

        bench.send_signal(signalled)
        status = bench.wait(60)

    assert status == 128 + signalled
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


@pytest.mark.slow
def test_live_servers_are_set_beside_the_simulator(tiny_artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    few = ["--policies", "maestro", "smallest", "--arrivals", "poisson", "--loads", "0.3"]

    load.main([str(tiny_artifact.path), "--quick", *few, "--out", str(out)])

    result = json.loads(out.read_text())
    assert {row["policy"] for row in result["rows"]} == {"maestro", "smallest"}
    for row in result["rows"]:
        assert row["difference"][0] == pytest.approx(
            row["live"]["met"][0] - row["simulated"]["met"][0]
        )
        assert row["live"]["request_ms"][0] + row["live"]["batch_ms"][0] > 0
        assert row["live"]["slower"][0] > 0
        late = row["live"]["sent_late_of_target"][0]
        assert row["kept_up"] == (late <= result["kept_up_within"])
    agreeing = [abs(row["difference"][0]) <= result["agree_within"] for row in result["rows"]]
    assert result["agreeing"] == sum(agreeing)
    assert all(row["way_ms"] > 0 for row in result["rows"])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [["--requests", "5"], ["--rounds", "0"]])
def test_numbers_that_make_no_sense_are_refused(wrong: list[str]) -> None:
    with pytest.raises(ValueError, match="--requests must be at least 100"):
        load.main(wrong)
