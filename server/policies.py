"""Which policy chooses: ours, or a published one, to be compared with it on a live server."""

import importlib
from collections.abc import Mapping

from server.latencies import Latencies
from server.scheduler import Scheduler
from server.selector import Policy, choose, reserve
from server.settings import OURS, PolicyName
from server.tables import Tables

OWN: Mapping[str, Policy] = {OURS: choose, "reserve": reserve}


def scheduler_of(
    name: PolicyName, latencies: Latencies, *, max_queue: int, slots: int
) -> Scheduler:
    """Return a scheduler that plans by the policy `name`; rivals are of benchmarks/simulator.

    Rivals give up nothing that is not late already, and are told no more than they were published
    with. Those that have one model deployed get the middle point.
    """
    if name in OWN:
        return Scheduler(latencies, policy=OWN[name], max_queue=max_queue, slots=slots)
    rivals = importlib.import_module("benchmarks.simulator.rivals")
    policy = rivals.RIVALS[name](Tables(latencies), len(latencies.accuracy) // 2)
    return Scheduler(latencies, policy=policy, max_queue=max_queue, slots=slots, sheds=False)
