"""One request sent over and over, rivals started and ended, and what is made of the figures."""

import asyncio
import io
import json
import os
import signal
import sys
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from benchmarks import overhead
from benchmarks.http_load import Call, Latencies, closed_loop, open_loop
from benchmarks.rival_server import FLOOR, MissingError, rival
from maestro_core.artifact import Artifact

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Load = Callable[[Call], Awaitable[Latencies]]


def loaded(handler: Handler, load: Load) -> Latencies:
    """Return what comes of a load on a server with one handler."""

    async def run() -> Latencies:
        app = web.Application()
        app.router.add_post("/infer", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            port = runner.addresses[0][1]
            return await load(Call(f"http://127.0.0.1:{port}/infer?point=1", "text/plain", b"abc"))
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_each_connection_waits_for_its_answer_before_it_sends_again() -> None:
    under_way, most = 0, 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal under_way, most
        assert (request.query["point"], await request.read()) == ("1", b"abc")
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        return web.Response(text="x" * 100_000)

    async def load(call: Call) -> Latencies:
        found, seconds = await closed_loop(call, 3, 0.1)
        assert seconds >= 0.1
        return found

    found = loaded(handler, load)

    assert most == 3
    assert found.failed == 0
    assert min(found.ms) > 10


def opened(arrivals_s: list[float]) -> Load:
    async def load(call: Call) -> Latencies:
        return (await open_loop(call, arrivals_s))[0]

    return load


def test_an_open_load_lasts_until_the_last_answer() -> None:
    lasted_s = []

    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(0.1)
        return web.Response()

    async def load(call: Call) -> Latencies:
        found, seconds = await open_loop(call, [0.0, 0.01])
        lasted_s.append(seconds)
        return found

    loaded(slow, load)

    assert lasted_s[0] >= 0.11, "answers that come after all was sent take their time too"


def test_an_open_load_does_not_wait_and_counts_from_when_it_should_have_sent() -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.1)
        response = web.Response(text="done")
        response.enable_chunked_encoding()
        return response

    found = loaded(handler, opened([0.0, 0.01, 0.02]))

    assert len(found.ms) == 3
    assert all(100 < ms < 300 for ms in found.ms)


def test_answers_other_than_200_have_no_latency() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(status=503)

    found = loaded(handler, opened([0.0, 0.0]))

    assert (found.ms, found.failed) == ([], 2)


async def closed(call: Call) -> Latencies:
    found, _ = await closed_loop(call, 2, 0.05)
    return found


@pytest.mark.parametrize("load", [opened([0.0, 0.01]), closed])
def test_a_server_that_hangs_up_has_failed_and_is_asked_again(load: Load) -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    found = loaded(handler, load)

    assert found.ms == []
    assert found.failed >= 2


def test_an_open_load_connects_again_where_an_idle_connection_was_ended() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        asyncio.get_running_loop().call_later(0.02, request.transport.close)
        return web.Response()

    found = loaded(handler, opened([0.0, 0.1, 0.2]))

    assert (len(found.ms), found.failed) == (3, 0)


def test_the_floor_answers_what_the_model_says(tiny_artifact: Artifact) -> None:
    graph = tiny_artifact.path / tiny_artifact.points[-1].graph
    shape = (1, *tiny_artifact.manifest.input.shape[1:])
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    file = io.BytesIO()
    np.save(file, x)
    bodies = {
        "application/json": json.dumps({"inputs": x.tolist()}).encode(),
        "application/x-npy": file.getvalue(),
    }

    with rival(FLOOR, sys.executable, graph, os.sched_getaffinity(0)) as started:
        answers = []
        for kind, body in bodies.items():
            request = urllib.request.Request(
                f"{started.address}/infer", body, {"content-type": kind}
            )
            with urllib.request.urlopen(request, timeout=10) as response:
                answers.append(np.asarray(json.load(response)["outputs"], np.float32))
    import onnxruntime as ort

    session = ort.InferenceSession(graph)
    (expected,) = session.run(None, {session.get_inputs()[0].name: x})

    for answer in answers:
        np.testing.assert_allclose(answer, expected, rtol=1e-5)
    with pytest.raises(ProcessLookupError):
        os.killpg(started.group, 0)


def test_a_rival_that_is_not_installed_is_missing(tmp_path: Path) -> None:
    with (
        pytest.raises(MissingError, match="has no mosec"),
        rival("mosec", str(tmp_path / "python"), tmp_path / "x.onnx", {0}),
    ):
        pass


def test_figures_of_all_rounds_are_taken_together() -> None:
    runs = [(Latencies([3.0] * 10), 2.0), (Latencies([3.0]), 0.5), (Latencies([], failed=4), 1.0)]

    row = overhead.row(("maestro", "json", "one"), runs)

    assert (row["n"], row["failed"], row["p50_ms"], row["per_s"]) == (11, 4, 3.0, 2.0)


def test_ratios_are_of_one_round_and_their_median_is_told() -> None:
    floor = [(Latencies([ms] * 10), ms) for ms in (1.0, 10.0, 2.0)]  # the host is slow for a while
    ours = [(Latencies([1.5 * ms] * 30), ms) for ms in (1.0, 10.0, 2.0)]
    silent = [(Latencies(), 1.0), *floor[1:]]
    found = {("maestro", "json", "many"): ours, ("mosec", "json", "many"): silent}

    assert overhead.over_floor(ours, floor) == {
        "p50_ms_over_floor": 1.5,
        "p99_ms_over_floor": 1.5,
        "per_s_over_floor": 3.0,
    }
    assert overhead.over_floor(silent[:1], floor[:1])["per_s_over_floor"] is None
    assert overhead.over_rivals(("maestro", "json", "many"), found) == {
        "per_s_over": {"mosec": 3.0}
    }


def test_a_server_stands_still_while_another_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, int]] = []
    during: list[list[tuple[str, int]]] = []

    async def load(_call: Call, *_: object) -> tuple[Latencies, float]:
        during.append(list(sent))
        return Latencies([1.0]), 1.0

    for name in ("closed_loop", "open_loop"):
        monkeypatch.setattr(overhead, name, load)
    monkeypatch.setattr(overhead, "settle", lambda _: None)
    names = ("floor", "maestro", "mosec")
    calls = {(name, form): Call("", "", b"") for name in names for form in overhead.FORMS}

    def signal_to(name: str) -> Callable[[int], object]:
        return lambda number: sent.append((name, number))

    signals = {name: signal_to(name) for name in names}
    bench = overhead.Bench(calls, 1.0, 0.5, set(), signals)

    for of in overhead.LOADS:
        sent.clear()
        during.clear()
        bench._run(("maestro", "json", of), seed=0)
        assert {*during[-1]} == {("floor", signal.SIGSTOP), ("mosec", signal.SIGSTOP)}
        assert sent[-2:] == [("floor", signal.SIGCONT), ("mosec", signal.SIGCONT)]


@pytest.mark.parametrize("wrong", [["--share", "1"], ["--rival", "nginx=x"]])
def test_options_that_make_no_sense_are_refused(wrong: list[str]) -> None:
    with pytest.raises(ValueError, match="--"):
        overhead.main(wrong)


@pytest.mark.slow
def test_ours_is_measured_beside_the_floor(tiny_artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"

    overhead.main([str(tiny_artifact.path), "--quick", "--seconds", "0.3", "--out", str(out)])

    result = json.loads(out.read_text())
    cells = {(row["server"], row["form"], row["load"]) for row in result["rows"]}
    assert {
        (name, form, load)
        for name in ("floor", "maestro")
        for form in ("json", "npy")
        for load in ("one", "many", "poisson")
    } <= cells
    assert all(row["n"] > 0 and row["failed"] == 0 for row in result["rows"])
