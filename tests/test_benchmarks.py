"""The programs that measure, on the tiny artifact: what they count, not how fast it is."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import (
    calibration,
    engine,
    fleet,
    frontier,
    layers,
    load,
    overhead,
    prediction,
    report,
    search,
    slots,
    training,
    workers,
)
from benchmarks.effort import Effort, Precision
from benchmarks.memory import grown_mib
from benchmarks.profiler import profile
from maestro_core.artifact import Artifact
from maestro_core.profile import Latency, Profile
from server.engine import Engine
from tests.conftest import TINY_LAYERS
from tests.test_profile import KEY


def constant_profile(ms: float) -> Profile:
    """Return a profile that says the same of everything."""
    cells = ((point, batch) for point in range(5) for batch in (1, 16))
    latencies = tuple(Latency(p, b, ms, ms, ms, ms, 1, ms, ms) for p, b in cells)
    return Profile(KEY, "2026-01-01", "quick", "time", 0.0, latencies)


def test_predictions_far_off_do_not_hold(tiny_artifact: Artifact) -> None:
    found = prediction.checked(Engine(tiny_artifact), constant_profile(1e6), runs=2, seed=0)

    assert found["pairs"] == len(found["predictions"]) == 30
    assert found["p50_within_10_percent"] == found["p95_within_10_percent"] == 0
    assert all(row["p50_error"] > 100 for row in found["predictions"])


def test_a_profile_of_an_engine_can_be_checked(tiny_artifact: Artifact) -> None:
    engine = Engine(tiny_artifact)
    made = profile(engine, Effort("quick", 0.3, Precision(min_runs=5)), batch_sizes=(1, 16))

    found = prediction.checked(engine, made, runs=2, seed=0)

    assert 0 <= found["p50_within_10_percent"] <= 30
    assert {row["n"] for row in found["predictions"]} == {2}


def test_the_fastest_form_is_the_one_of_least_time() -> None:
    rows = layers.compared(TINY_LAYERS, budget_s=0.2)

    assert {row["layer"] for row in rows} == {"conv", "fc"}
    for row in rows:
        times = {form: row[f"{form}_ms"] for form in layers.FORMS}
        assert times[row["fastest"]] == min(times.values())


def test_every_split_of_the_cores_is_compared(tiny_artifact: Artifact, tmp_path: Path) -> None:
    rows = slots.compared(tiny_artifact, tmp_path, cores=2, seconds=0.02, rounds=1)

    assert [(row["slots"], row["threads"]) for row in rows] == [(2, 1), (1, 2)] * 4
    assert {(row["point"], row["batch"]) for row in rows} == {(0, 1), (0, 8), (4, 1), (4, 8)}
    assert all(row["n"] > 0 and row["samples_per_s"] > 0 for row in rows)


def test_cells_are_judged_by_their_own_export_and_by_the_last_point() -> None:
    times_ms = {(0, 1): (1.0, 1.1), (1, 1): (2.0, 1.9), (0, 8): (8.3, 8.0), (1, 8): (8.0, 8.1)}
    rows = [
        {
            "point": point,
            "batch": batch,
            "engine_p50_ms": ours,
            "alone_p50_ms": alone,
            "ratio": round(ours / alone, 3),
        }
        for (point, batch), (ours, alone) in times_ms.items()
    ]

    found = engine._over_alone(rows)

    assert found["max_ratio"] == 1.053
    assert found["over_1.05"] == 1
    assert found["slower_than_dense_by_2_percent"] == [1, 0]


def test_a_budget_too_short_for_every_point_is_refused(
    tiny_artifact: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="--budget-s 1e-09 leaves no time for each point"):
        engine._speed({"mapped": Engine(tiny_artifact)}, tmp_path, budget_s=1e-9)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_another_process(tiny_artifact: Artifact, tmp_path: Path) -> None:
    grown = grown_mib(tiny_artifact.path, "never", 5, 1, tmp_path)

    assert set(grown) == {"private", "private_dirty", "pss", "rss"}
    assert grown["private_dirty"] <= grown["private"]


def test_a_result_is_written_with_its_conditions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "result.json"

    report.write({**report.conditions(), "value": 1}, path)

    result = json.loads(path.read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert {"date", "host", "versions", "compiled", "commit", "value"} == set(result)


def test_a_figure_that_is_no_number_is_null_in_a_result(tmp_path: Path) -> None:
    path = tmp_path / "result.json"

    report.write({"rows": [{"accuracy": math.nan}], "met": math.inf, "n": 0.25}, path)

    assert json.loads(path.read_text()) == {"rows": [{"accuracy": None}], "met": None, "n": 0.25}


def test_a_quick_run_leaves_the_published_result_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(training, "NETWORKS", ())

    training.main(["--quick"])
    quick, printed = list(tmp_path.iterdir()), json.loads(capsys.readouterr().out)
    training.main([])

    assert quick == []
    assert printed["batch"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["training.json"]


@pytest.mark.parametrize(
    "given",
    [
        (prediction.main, "--runs", "0"),
        (slots.main, "--seconds", "0"),
        (training.main, "--rounds", "x"),
        (calibration.main, "--load", "nan"),
        (load.main, "--loads", "inf"),
        (overhead.main, "--seconds", "nan"),
        (workers.main, "--seconds", "inf"),
        (workers.main, "--connections", "0"),
        (fleet.main, "--rps", "inf"),
        (fleet.main, "--target-ms", "-1"),
        (engine.main, "--budget-s", "-1"),
        (layers.main, "--budget-s", "0"),
        (search.main, "--threads", "0"),
        (frontier.main, "--threads", "0"),
        (frontier.main, "--epochs", "-3"),
    ],
    ids=lambda given: f"{given[0].__module__} {given[1]}",
)
def test_numbers_that_make_no_sense_are_refused_at_once(
    given: tuple[Callable[[Sequence[str]], None], str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    program, option, value = given

    with pytest.raises(SystemExit):
        program([option, value])

    assert f"argument {option}: {value} is not a " in capsys.readouterr().err


def test_a_load_that_leaves_no_pause_is_refused() -> None:
    with pytest.raises(ValueError, match="--load is 50, not below 1"):
        calibration.main(["--load", "50"])


def test_fewer_samples_than_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--samples is -1"):
        frontier.main(["--data", str(tmp_path), "--samples", "-1"])


def test_a_trace_is_read_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--trace says which file"):
        load.main(["--arrivals", "trace"])
    with pytest.raises(OSError, match=r"none\.txt"):
        load.main(["--trace", str(tmp_path / "none.txt")])


def test_time_behind_the_gate_does_not_count_as_giving_way() -> None:
    now_s = 0.0
    gate = calibration._Gate(lambda: now_s)

    found_s = []
    for action in (gate.close, gate.open, gate.open, gate.close, gate.open):
        now_s += 1.0
        action()
        found_s.append(gate.open_s())

    assert found_s == [0.0, 0.0, 1.0, 2.0, 2.0]
