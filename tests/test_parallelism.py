"""The choice of threads: measured once, then read; fewer where more do not pay."""

from pathlib import Path

import pytest

from benchmarks.parallelism import best_threads, fewest
from maestro_core.artifact import Artifact


@pytest.mark.parametrize(
    ("costs", "chosen"),
    [
        ({1: 10.0, 2: 5.5, 4: 4.0}, 4),
        ({1: 10.0, 2: 4.1, 4: 4.0}, 2),
        ({1: 4.0, 2: 4.5, 4: 9.0}, 1),
        ({1: 1.0}, 1),
    ],
)
def test_a_thread_more_must_pay(costs: dict[int, float], chosen: int) -> None:
    assert fewest(costs) == chosen


def test_the_choice_fits_the_cores_and_is_kept(tiny_artifact: Artifact, tmp_path: Path) -> None:
    found = best_threads(tiny_artifact, tmp_path, cores=2)

    assert found in (1, 2)
    (path,) = (tmp_path / "parallelism").iterdir()
    path.write_text(f'{{"intra_op_threads": {3 - found}}}')
    assert best_threads(tiny_artifact, tmp_path, cores=2) == 3 - found


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"intra_op_threads": 64}'])
def test_a_damaged_choice_is_measured_again(
    tiny_artifact: Artifact, tmp_path: Path, damage: str
) -> None:
    best_threads(tiny_artifact, tmp_path, cores=1)
    (path,) = (tmp_path / "parallelism").iterdir()
    path.write_text(damage)

    assert best_threads(tiny_artifact, tmp_path, cores=1) == 1
    assert path.read_text() != damage
