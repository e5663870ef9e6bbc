"""What the metrics say of answers that were late."""

import numpy as np
import pytest

from maestro_core.artifact import Artifact
from server.answers import Inference, infer_answer
from server.metrics import Cause, Metrics, missed_by
from server.schemas import InferParameters


def inference(predicted_ms: float, queue_ms: float, compute_ms: float) -> Inference:
    return Inference(np.zeros((1, 10), np.float32), 0, predicted_ms, queue_ms, compute_ms, 1)


@pytest.mark.parametrize(
    ("ran", "cause"),
    [
        (inference(predicted_ms=12.0, queue_ms=0.0, compute_ms=11.0), "infeasible"),
        (inference(predicted_ms=4.0, queue_ms=1.0, compute_ms=20.0), "compute"),
        (inference(predicted_ms=4.0, queue_ms=20.0, compute_ms=4.0), "queue"),
        (inference(predicted_ms=4.0, queue_ms=6.0, compute_ms=10.0), "several"),
    ],
)
def test_a_late_answer_has_one_cause(ran: Inference, cause: Cause) -> None:
    around_ms = 0.5

    assert missed_by(ran, ran.queue_ms + ran.compute_ms + around_ms, target_ms=10.0) == cause


def test_only_late_answers_are_counted_as_missed() -> None:
    metrics = Metrics()
    ran = inference(predicted_ms=4.0, queue_ms=20.0, compute_ms=4.0)

    metrics.answered(ran, total_ms=24.5, target_ms=None)
    metrics.answered(ran, total_ms=24.5, target_ms=24.5)
    assert metrics.registry.get_sample_value("maestro_missed_total", {"cause": "queue"}) is None
    metrics.answered(ran, total_ms=24.5, target_ms=10.0)

    assert metrics.registry.get_sample_value("maestro_missed_total", {"cause": "queue"}) == 1


def test_an_answer_is_counted_as_it_says_that_it_was(tiny_artifact: Artifact) -> None:
    metrics, target_ms = Metrics(), 5.0
    ran = inference(predicted_ms=4.0, queue_ms=0.0, compute_ms=4.0)

    answer = infer_answer(
        tiny_artifact, InferParameters(max_latency_ms=target_ms), ran, total_s=0.0050004
    )
    metrics.answered(ran, answer["total_ms"], target_ms)

    was_on_time = metrics.registry.get_sample_value(
        "maestro_requests_total", {"outcome": "ok", "point": "0"}
    )
    assert answer["target_met"] == (was_on_time == 1) == (answer["total_ms"] <= target_ms)


def test_a_host_that_is_not_profiled_yet_has_not_drifted() -> None:
    assert Metrics().registry.get_sample_value("maestro_slowdown") == 1


def test_a_target_of_nothing_leaves_sums_finite() -> None:
    metrics = Metrics()

    metrics.answered(inference(1.0, 0.0, 1.0), total_ms=1.0, target_ms=1e-320)

    assert metrics.registry.get_sample_value("maestro_target_ratio_sum") == pytest.approx(1000)


def test_an_error_without_a_reason_is_not_shed() -> None:
    metrics = Metrics()

    metrics.refused("bad-request")
    metrics.refused("unavailable", "full")

    assert metrics.registry.get_sample_value("maestro_shed_total", {"reason": "full"}) == 1
    shed = [s for f in metrics.registry.collect() if f.name == "maestro_shed" for s in f.samples]
    assert sum(s.value for s in shed if s.name == "maestro_shed_total") == 1
