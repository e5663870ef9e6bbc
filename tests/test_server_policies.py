"""The policies that a live server can be given."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from fastapi.testclient import TestClient

from benchmarks.simulator.rivals import RIVALS
from maestro_core import artifact, cli
from server.app import create_app
from server.errors import InvalidError
from server.latencies import Latencies
from server.policies import OWN, check_kept, scheduler_of
from server.policy_names import OURS, PolicyName
from server.requests import Admitted, Request
from server.settings import Settings, read_settings
from tests.conftest import tiny_contents, tiny_manifest
from tests.test_app import SAMPLE, check_problem, infer, wait_until_ready

P50_MS = ((1.0, 1.5), (2.0, 3.0), (4.0, 6.0))
LATENCIES = Latencies((0.7, 0.8, 0.9), P50_MS, P50_MS)


def test_every_rival_of_the_simulator_can_serve() -> None:
    assert set(get_args(PolicyName)) == {*OWN, *RIVALS}
    assert Settings().policy == OURS


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_each_policy_plans_what_it_was_given(name: PolicyName) -> None:
    scheduler = scheduler_of(name, LATENCIES, max_queue=10, slots=1)
    request = Request("a", 0.0, 0.1)

    assert isinstance(scheduler.submit(request, 0.0), Admitted)
    plan = scheduler.plan(0.0)
    if plan.batch is None:  # some wait for company first
        assert plan.wake_s is not None
        plan = scheduler.plan(plan.wake_s)

    assert plan.batch is not None
    assert plan.batch.requests == (request,)


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_no_policy_fills_a_batch_with_more_rows_than_it_holds(name: PolicyName) -> None:
    scheduler = scheduler_of(name, LATENCIES, max_queue=10, slots=1)
    for i in range(4):
        scheduler.submit(Request(str(i), 0.0, 10.0, rows=2), 0.0)

    plan = scheduler.plan(0.0)
    if plan.batch is None and plan.wake_s is not None:
        plan = scheduler.plan(plan.wake_s)

    assert plan.batch is not None
    assert plan.batch.rows == 2


ASKED = [
    (Request("a", 0.0, min_accuracy=0.0), "min_accuracy"),
    (Request("a", 0.0, point=0), "point"),
    (Request("a", 0.0, 0.1, on_miss="reject"), "on_miss=reject"),
    (Request("a", 0.0, min_accuracy=0.5, point=1), "min_accuracy, point"),
]


@pytest.mark.parametrize("name", get_args(PolicyName))
@pytest.mark.parametrize(("asking", "named"), ASKED)
def test_what_a_policy_does_not_keep_is_refused(
    name: PolicyName, asking: Request, named: str
) -> None:
    check_kept(name, Request("a", 0.0, 0.1, priority=1))
    if name in OWN:
        check_kept(name, asking)
        return

    with pytest.raises(InvalidError, match=f"^{named}: not kept .* '{name}'; maestro and reserve"):
        check_kept(name, asking)


def test_a_server_with_a_rival_refuses_what_it_does_not_keep(tmp_path: Path) -> None:
    artifact.save(tmp_path / "tiny.maestro", tiny_manifest(), tiny_contents())
    settings = Settings(
        artifact=tmp_path / "tiny.maestro",
        state_dir=tmp_path,
        threads=1,
        max_batch=1,
        calibration_budget_s=0.5,
        policy="smallest",
    )
    floor = {"min_accuracy": 0.9}
    with TestClient(create_app(settings)) as client:
        wait_until_ready(client)
        tensor = {"name": "x", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": SAMPLE.tolist()}
        answers = [
            client.post("/infer", json={"inputs": SAMPLE.tolist(), **floor}),
            client.post("/v2/models/tiny/infer", json={"inputs": [tensor], "parameters": floor}),
            client.post("/explain", json=floor),
        ]
        infer(client, "?max_latency_ms=1000&top_k=2")

    for answer in answers:
        check_problem(answer, 422, "min_accuracy: not kept by the policy 'smallest'")


@pytest.mark.parametrize(("name", "point"), [("largest", 2), ("middle", 1), ("smallest", 0)])
def test_a_fixed_policy_keeps_to_its_point(name: PolicyName, point: int) -> None:
    scheduler = scheduler_of(name, LATENCIES, max_queue=10, slots=1)
    scheduler.submit(Request("a", 0.0, 1.0), 0.0)

    batch = scheduler.plan(0.0).batch

    assert batch is not None
    assert batch.point == point


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_explain_says_what_the_policy_then_does(name: PolicyName) -> None:
    for target_s in (0.0001, 0.002, 0.006, 1.0, None):
        scheduler = scheduler_of(name, LATENCIES, max_queue=10, slots=1)
        request = Request("a", 0.0, target_s)

        explanation = scheduler.explain(request, 0.0)
        scheduler.submit(request, 0.0)
        plan = scheduler.plan(0.0)

        assert explanation.point == (plan.batch and plan.batch.point), target_s
        assert ("gives it up" in explanation.why) == bool(plan.expired), target_s


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_a_policy_is_explained_without_learning_of_it(name: PolicyName) -> None:
    asked, silent = (scheduler_of(name, LATENCIES, max_queue=10, slots=1) for _ in range(2))
    for i in range(12):
        now = 0.05 * i
        batches = []
        for scheduler in (asked, silent):
            for j in range(3):
                scheduler.submit(Request(f"{i}.{j}", now, now + 0.02), now)
            batch = scheduler.plan(now).batch
            batches.append(batch and (batch.point, batch.rows))
            if scheduler is asked:
                scheduler.explain(Request("what if", now, now + 10.0), now)
            if batch:
                scheduler.done(batch.id, 30.0 if i % 2 else 4.0, now + 0.03)

        assert batches[0] == batches[1], i


def test_a_policy_that_is_not_ours_is_known_by_its_next_batch_alone() -> None:
    scheduler = scheduler_of("smallest", LATENCIES, max_queue=10, slots=1)
    for i in range(9):
        scheduler.submit(Request(f"{i}", 0.0, 0.1), 0.0)

    explanation = scheduler.explain(Request("later", 0.0, 0.2), 0.0)

    assert explanation.point is None
    assert "not in the policy's next batch" in explanation.why
    assert explanation.refusal is None


def test_an_unknown_policy_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"MAESTRO_POLICY: .*'maestro', .*'slackfit'.*'best'"):
        read_settings(policy="best")


def test_our_own_policies_alone_interrupt_batches() -> None:
    names = get_args(PolicyName)

    preempting = {n for n in names if scheduler_of(n, LATENCIES, max_queue=10, slots=1).preempts}

    assert preempting == set(OWN)


def test_the_names_are_written_once() -> None:
    program = Path(cli.__file__).read_text()

    assert [name for name in ("infaas", "slackfit", "clockwork") if name in program] == []


def test_the_help_lists_them() -> None:
    program = "from maestro_core.cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", program, "serve", "--help"], capture_output=True, text=True
    ).stdout

    assert all(name in shown for name in get_args(PolicyName))
