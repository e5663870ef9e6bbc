"""`maestro bench fleet`: how many replicas a load needs."""

import json
from pathlib import Path

import pytest

from benchmarks import fleet
from benchmarks.fleet import compared, needed, workload
from benchmarks.simulator.host import Quantiles
from maestro_core.artifact import Artifact
from tests.test_policies import profile_of

# Points of 2 and 8 ms, whatever the batch is: no spread, and nothing gained by batches.
QUANTILES = Quantiles(
    (0.7, 0.8),
    (1,),
    *([[2.0], [8.0]],) * 4,
)


def test_a_fleet_of_fixed_points_grows_with_the_load() -> None:
    rows = {
        rps: compared(QUANTILES, [workload(QUANTILES, "poisson", rps, 40, 800, 0)], range(1, 4))
        for rps in (100, 300)
    }

    # A replica of the largest point carries 125 a second: two could not carry 300.
    assert needed(rows[100], "largest", 0.99, 0.0) == 2
    assert needed(rows[300], "largest", 0.99, 0.0) == 3
    # One of the smallest carries 500.
    assert needed(rows[300], "smallest", 0.99, 0.0) == 1


def test_points_to_choose_from_need_fewer_replicas_than_the_largest() -> None:
    rows = compared(QUANTILES, [workload(QUANTILES, "gamma4", 300, 40, 800, 0)], range(1, 4))

    assert needed(rows, "ours", 0.99, 0.0) in (1, 2)
    assert needed(rows, "largest", 0.99, 0.0) is None
    one, two, three = (row["accuracy"][0] for row in rows if row["policy"] == "ours")
    assert 0.7 <= one < two < three, "what more replicas give is accuracy"


def test_an_accuracy_that_is_asked_for_counts_and_one_out_of_reach_needs_none_tried() -> None:
    rows = compared(QUANTILES, [workload(QUANTILES, "poisson", 100, 40, 500, 0)], [1, 2])

    assert needed(rows, "smallest", 0.99, 0.7) == 1
    assert needed(rows, "smallest", 0.99, 0.75) is None


def test_the_program_says_how_many_are_needed(tiny_artifact: Artifact, tmp_path: Path) -> None:
    stored, out = tmp_path / "profile.json", tmp_path / "fleet.json"
    stored.write_text(profile_of(len(tiny_artifact.points), tiny_artifact.digest).to_json())
    given = ["--profile", str(stored), "--rps", "200", "--target-ms", "60", "--requests", "100"]
    few = ["--seeds", "1", "--replicas", "2", "--out", str(out)]

    fleet.main([str(tiny_artifact.path), *given, *few])

    result = json.loads(out.read_text())
    assert set(result["needed"]) == {"ours", "largest", "smallest"}
    assert [row["replicas"] for row in result["rows"] if row["policy"] == "ours"] == [1, 2]


@pytest.mark.parametrize("wrong", ["--replicas", "--seeds", "--requests"])
def test_counts_that_make_no_sense_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        fleet.main(["--rps", "10", "--target-ms", "5", wrong, "0"])
