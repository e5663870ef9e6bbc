"""Requests sent at their times whatever became of those before, over HTTP.

A latency counts from when a request should have been sent: one that had to wait for a connection,
or for the generator itself, waited like any other (coordinated omission, as Gil Tene named it).
"""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import orjson

MS = 1e3
# Sleeping is that exact; the rest is spun away.
SPIN_S = 0.5e-3


@dataclass(slots=True)
class Sent:
    """What became of one request; times in ms from when it should have been sent.

    late_ms: when it was sent. latency_ms: when its answer was there, NaN if it was refused.
    server_ms, accuracy: what the server says it took, and of the point that answered.
    """

    status: int
    late_ms: float
    latency_ms: float = math.nan
    server_ms: float = math.nan
    accuracy: float = math.nan


async def send_all(
    url: str, body: bytes, media_type: str, arrivals_s: Sequence[float], targets_ms: Sequence[float]
) -> list[Sent]:
    """Send `body` at each of `arrivals_s`, with its target; return what became of each, in order.

    Raises:
        aiohttp.ClientError: the server can't be reached.
    """
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        began_s = time.perf_counter()
        tasks = []
        for arrival_s, target_ms in zip(arrivals_s, targets_ms, strict=True):
            due_s = began_s + arrival_s
            await until(due_s)
            sending = _send(session, url, body, media_type, target_ms, due_s)
            tasks.append(asyncio.ensure_future(sending))
        return await asyncio.gather(*tasks)


async def until(due_s: float) -> None:
    """Return at `due_s`, or at once when it has passed, having let others go on."""
    left_s = due_s - time.perf_counter()
    await asyncio.sleep(max(0.0, left_s - SPIN_S))
    while time.perf_counter() < due_s:
        await asyncio.sleep(0)


async def _send(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    media_type: str,
    target_ms: float,
    due_s: float,
) -> Sent:
    headers = {"content-type": media_type, "x-max-latency-ms": f"{target_ms:.4f}"}
    late_ms = MS * (time.perf_counter() - due_s)
    async with session.post(url, data=body, headers=headers) as response:
        answer = await response.read()
        latency_ms = MS * (time.perf_counter() - due_s)
    if response.status != 200:
        return Sent(response.status, late_ms)
    said = orjson.loads(answer)
    return Sent(200, late_ms, latency_ms, said["total_ms"], said["accuracy"])
