"""Which policy chooses: ours, or a published one, to be compared with it on a live server."""

import importlib
from collections.abc import Mapping

from server.errors import InvalidError
from server.latencies import Latencies
from server.policy_names import OURS, RESERVE, PolicyName
from server.requests import Request
from server.scheduler import Scheduler
from server.selector import Policy, choose, reserve
from server.tables import Tables

OWN: Mapping[str, Policy] = {OURS: choose, RESERVE: reserve}


def scheduler_of(
    name: PolicyName, latencies: Latencies, *, max_queue: int, slots: int
) -> Scheduler:
    """Return a scheduler that plans by the policy `name`; rivals are of benchmarks/simulator.

    Rivals give up nothing that is not late already, and are told no more than they were published
    with. Those that have one model deployed get the middle point.
    """
    if name in OWN:
        return Scheduler(
            latencies, policy=OWN[name], max_queue=max_queue, slots=slots, preempts=True
        )
    rivals = importlib.import_module("benchmarks.simulator.rivals")
    policy = rivals.RIVALS[name](Tables(latencies), len(latencies.accuracy) // 2)
    return Scheduler(latencies, policy=policy, max_queue=max_queue, slots=slots, sheds=False)


def check_kept(name: PolicyName, request: Request) -> None:
    """Let requests pass that ask nothing of the policy `name` but to be on time.

    Raises:
        InvalidError: a rival knows no floor, no point of a request's own and no refusal.
    """
    if name in OWN:
        return
    asked = {
        "min_accuracy": request.min_accuracy is not None,
        "point": request.point is not None,
        "on_miss=reject": request.on_miss == "reject",
    }
    unkept = [parameter for parameter, is_asked in asked.items() if is_asked]
    if unkept:
        raise InvalidError(
            f"{', '.join(unkept)}: not kept by the policy '{name}'; {' and '.join(OWN)} do"
        )
