"""What `/v2/models/NAME/stats` counts: requests and batches, in the protocol's own terms."""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from server.answers import Inference

NS_PER_MS = 1e6


@dataclass(slots=True)
class Spent:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, ms: float) -> None:
        """Count one more."""
        self.count += 1
        self.ns += round(ms * NS_PER_MS)

    def entry(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass(slots=True)
class Statistics:
    """Counters since the start of the server."""

    inferences: int = 0
    last_unix_ms: int = 0
    success: Spent = field(default_factory=Spent)
    fail: Spent = field(default_factory=Spent)
    queue: Spent = field(default_factory=Spent)
    compute: Spent = field(default_factory=Spent)
    batches: dict[int, Spent] = field(default_factory=lambda: defaultdict(Spent))

    def answered(self, inference: Inference, total_ms: float) -> None:
        """Count an answer."""
        self.inferences += len(inference.output)
        self.last_unix_ms = time.time_ns() // 1_000_000
        self.success.add(total_ms)
        self.queue.add(inference.queue_ms)
        self.compute.add(inference.compute_ms)

    def ran(self, size: int, compute_ms: float) -> None:
        """Count a batch."""
        self.batches[size].add(compute_ms)

    def answer(self, name: str, version: str) -> dict[str, Any]:
        """Return the statistics extension's answer."""
        nothing = Spent().entry()
        return {
            "model_stats": [
                {
                    "name": name,
                    "version": version,
                    "last_inference": self.last_unix_ms,
                    "inference_count": self.inferences,
                    "execution_count": sum(spent.count for spent in self.batches.values()),
                    "inference_stats": {
                        "success": self.success.entry(),
                        "fail": self.fail.entry(),
                        "queue": self.queue.entry(),
                        "compute_input": nothing,
                        "compute_infer": self.compute.entry(),
                        "compute_output": nothing,
                        "cache_hit": nothing,
                        "cache_miss": nothing,
                    },
                    "batch_stats": [
                        {
                            "batch_size": size,
                            "compute_input": nothing,
                            "compute_infer": spent.entry(),
                            "compute_output": nothing,
                        }
                        for size, spent in sorted(self.batches.items())
                    ],
                }
            ]
        }
