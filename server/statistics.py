"""What `/v2/models/NAME/stats` counts: requests and batches, in the protocol's own terms.

The counters are one row of integers for each worker. A server alone has one row; several workers
map the rows of all (`server.processes.counters`), and each answers with their sum.
"""

import time
from collections.abc import Sequence
from typing import Any

from server.answers import Inference
from server.settings import LARGEST_BATCH

NS_PER_MS = 1e6

Row = memoryview  # of 64-bit integers
# An answer, what it took in all, and its target, in ms.
Answer = tuple[Inference, float, float | None]

# Columns of a row. From _SUCCESS on each is a count, and nanoseconds in the column after it; from
# _BATCHES on one for each size of a batch: a stored profile may have larger ones than the settings.
_INFERENCES, _LAST_UNIX_MS, _SUCCESS, _FAIL, _QUEUE, _COMPUTE, _BATCHES = 0, 1, 2, 4, 6, 8, 10
WIDTH = _BATCHES + 2 * LARGEST_BATCH


def private_row() -> Row:
    """Return a row that no other process sees."""
    return memoryview(bytearray(8 * WIDTH)).cast("q")


class Statistics:
    """Counters since the start of the server: this process adds to `row`, one of `rows`."""

    def __init__(self, row: Row, rows: Sequence[Row]) -> None:
        self._row, self._rows = row, rows

    def answered(self, answers: Sequence[Answer]) -> None:
        """Count answers: some at once, as a batch has many."""
        samples, success_ms, queue_ms, compute_ms = 0, 0.0, 0.0, 0.0
        for inference, total_ms, _ in answers:
            samples += len(inference.output)
            success_ms += total_ms
            queue_ms += inference.queue_ms
            compute_ms += inference.compute_ms
        self._row[_INFERENCES] += samples
        self._row[_LAST_UNIX_MS] = time.time_ns() // 1_000_000
        self._add(_SUCCESS, len(answers), success_ms)
        self._add(_QUEUE, len(answers), queue_ms)
        self._add(_COMPUTE, len(answers), compute_ms)

    def failed(self) -> None:
        """Count a request that was answered with an error."""
        self._add(_FAIL, 1, 0.0)

    def ran(self, size: int, compute_ms: float) -> None:
        """Count a batch."""
        self._add(_BATCHES + 2 * (size - 1), 1, compute_ms)

    def answer(self, name: str, version: str) -> dict[str, Any]:
        """Return the statistics extension's answer, of all workers together."""
        total = [sum(column) for column in zip(*self._rows, strict=True)]
        nothing = _entry([0, 0], 0)
        sizes = [at for at in range(_BATCHES, len(total), 2) if total[at]]
        return {
            "model_stats": [
                {
                    "name": name,
                    "version": version,
                    "last_inference": max(row[_LAST_UNIX_MS] for row in self._rows),
                    "inference_count": total[_INFERENCES],
                    "execution_count": sum(total[at] for at in sizes),
                    "inference_stats": {
                        "success": _entry(total, _SUCCESS),
                        "fail": _entry(total, _FAIL),
                        "queue": _entry(total, _QUEUE),
                        "compute_input": nothing,
                        "compute_infer": _entry(total, _COMPUTE),
                        "compute_output": nothing,
                        "cache_hit": nothing,
                        "cache_miss": nothing,
                    },
                    "batch_stats": [
                        {
                            "batch_size": (at - _BATCHES) // 2 + 1,
                            "compute_input": nothing,
                            "compute_infer": _entry(total, at),
                            "compute_output": nothing,
                        }
                        for at in sizes
                    ],
                }
            ]
        }

    def _add(self, at: int, count: int, ms: float) -> None:
        self._row[at] += count
        self._row[at + 1] += round(ms * NS_PER_MS)


def _entry(counts: Sequence[int], at: int) -> dict[str, int]:
    return {"count": counts[at], "ns": counts[at + 1]}
