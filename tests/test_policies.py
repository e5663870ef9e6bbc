"""`maestro bench policies`: from an artifact and a profile to a verdict and a picture."""

import json
import time
from pathlib import Path

import pytest

from benchmarks import policies, policies_plot
from benchmarks.simulator.rivals import RIVALS
from benchmarks.simulator.scenarios import ARRIVALS
from maestro_core.artifact import Artifact
from maestro_core.host import Host
from maestro_core.profile import Latency, Profile, ProfileKey


def profile_of(points: int, artifact: str = "digest") -> Profile:
    key = ProfileKey(artifact, Host.here(), "cpu", 1, 1, 1, ())
    cells = [
        Latency(point, batch, ms, 1.1 * ms, 1.1 * ms, 1.2 * ms, 100, ms, ms)
        for point in range(points)
        for batch, ms in ((b, 2.0 ** (point + 1) * (2 + b) / 3) for b in (1, 4, 8))
    ]
    return Profile(key, "2026-01-01T00:00:00Z", "quick", "precision", 0.2, tuple(cells))


def test_the_program_writes_its_result_and_its_picture(
    tiny_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "profile.json"
    stored.write_text(profile_of(len(tiny_artifact.points), tiny_artifact.digest).to_json())
    out = tmp_path / "policies.json"
    given = ["--profile", str(stored), "--requests", "100", "--seeds", "1", "--steady", "200"]

    policies.main([str(tiny_artifact.path), *given, "--out", str(out)])

    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert {row["arrivals"] for row in result["rows"]} == set(ARRIVALS) - {"trace"}
    assert {"ours", "slackfit", "bentoml"} < {row["policy"] for row in result["rows"]}
    assert result["reached"]["steady"]["met"] > 0.9
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


LEFT_HERE: list[object] = []  # as sessions of an engine are, whose threads a fork lacks


def left_of_the_parent(_: int) -> int:
    return len(LEFT_HERE)


def test_processes_that_simulate_have_nothing_of_the_one_that_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.test_policies.LEFT_HERE", [object()])

    assert policies._in_parallel(left_of_the_parent, [0, 1], "nothing") == {0: 0, 1: 0}


def first_fails(mark: Path) -> None:
    if mark.name == "0":
        raise ValueError("the first")
    mark.touch()
    time.sleep(0.1)


def test_where_one_case_fails_no_more_are_begun(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the first"):
        policies._in_parallel(first_fails, [tmp_path / str(i) for i in range(100)], "nothing")

    assert len(list(tmp_path.iterdir())) < 99


def test_the_picture_leaves_no_policy_out() -> None:
    assert policies_plot.SHOWN.keys() == {*policies.OURS, *RIVALS}


def test_made_up_accuracies_rise_between_their_ends() -> None:
    assert policies.made_up([1.0, 2.0, 4.0]) == pytest.approx([0.73, 0.765, 0.80])


def row(policy: str, met: float, accuracy: float, arrivals: str = "gamma4") -> policies.Row:
    return {
        "arrivals": arrivals,
        "targets": "one",
        "load": 1.0,
        "policy": policy,
        "met": (met, 0.0),
        "met_by_seed": [met - 0.001, met + 0.001],
        "met_feasible": (met, 0.0),
        "accuracy": (accuracy, 0.0),
    }


def test_the_verdict_compares_accuracy_at_equal_targets_met() -> None:
    rows = [
        row("ours", 0.998, 0.77),
        row("smallest", 0.999, 0.60),
        row("slackfit", 0.99, 0.78),
        row("slackfit 0.9", 0.998, 0.76),
        row("slackfit 0.8", 0.999, 0.75),
        row("largest", 0.4, 0.80),
    ]

    [verdict] = policies.against_rivals(rows, "ours")
    assert verdict["best_rival"] == "smallest"
    assert verdict["met_margin"] == pytest.approx((-0.001, 0.0))
    assert verdict["accuracy_margin"] == pytest.approx(0.01)
    assert verdict["misses"] == pytest.approx(0.2)
    assert policies.bursts(rows, "ours")[0]["ours"] == (0.998, 0.0)


def test_bursts_leave_out_what_the_largest_point_carries() -> None:
    rows = [row("ours", 1.0, 0.8), row("largest", 0.7, 0.8)]

    assert policies.bursts(rows, "ours") == []


def test_counts_out_of_range_are_refused() -> None:
    for given in (["--requests", "0"], ["--seeds", "0"], ["--steady", "1"]):
        with pytest.raises(ValueError, match="must be at least"):
            policies.main(given)


def test_a_profile_of_another_artifact_is_refused(tiny_artifact: Artifact, tmp_path: Path) -> None:
    stored = tmp_path / "profile.json"
    stored.write_text(profile_of(len(tiny_artifact.points)).to_json())

    with pytest.raises(ValueError, match="a profile of another artifact"):
        policies.read_quantiles(tiny_artifact.path, stored)


def test_a_trace_that_is_missing_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=r"none\.txt"):
        policies.main(["--trace", str(tmp_path / "none.txt")])
