"""Requests with targets, sent at their times to `POST /infer`, and what the server says of them."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import orjson

from benchmarks.http_load import MS, OK, Answer, Call, Pool, at_their_times


@dataclass(slots=True)
class Sent:
    """What became of one request; times in ms from when it should have been sent.

    late_ms: when it was sent. latency_ms: when its answer was there, NaN if it was refused.
    The rest is what the server says: how long it took in all and in the engine, and the tail that
    it counted on for the engine, in a batch of how many rows, and which point of what accuracy
    answered.
    """

    status: int
    late_ms: float
    latency_ms: float = math.nan
    server_ms: float = math.nan
    compute_ms: float = math.nan
    predicted_ms: float = math.nan
    rows: int = 0
    point: int = -1
    accuracy: float = math.nan


async def send_all(
    url: str,
    body: bytes,
    media_type: str,
    arrivals_s: Sequence[float],
    targets_ms: Sequence[float],
    resting: Callable[[int], None] = lambda _sent: None,
) -> list[Sent]:
    """Send `body` at each of `arrivals_s`, with its target; return what became of each, in order.

    resting: see `http_load.at_their_times`.

    Raises:
        OSError: the server can't be reached.
    """
    calls = [
        Call(url, media_type, body, {"x-max-latency-ms": f"{target_ms:.4f}"})
        for target_ms in targets_ms
    ]
    requests = [call.to_bytes() for call in calls]
    pool = Pool(calls[0].address)

    async def send(i: int, due_s: float) -> tuple[Answer, float, float]:
        answer = await pool.send(requests[i])
        return answer, answer.written_s - due_s, time.perf_counter() - due_s

    await pool.open()
    try:
        answers = await at_their_times(arrivals_s, send, resting)
    finally:
        pool.close()
    return [_sent(answer, MS * late_s, MS * latency_s) for answer, late_s, latency_s in answers]


def _sent(answer: Answer, late_ms: float, latency_ms: float) -> Sent:
    if answer.status != OK:
        return Sent(answer.status, late_ms)
    said = orjson.loads(answer.body)
    return Sent(
        OK,
        late_ms,
        latency_ms,
        said["total_ms"],
        said["compute_ms"],
        said["predicted_ms"],
        said["batch_size"],
        said["point"],
        said["accuracy"],
    )
