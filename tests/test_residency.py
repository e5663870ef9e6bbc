"""Which points stay in memory."""

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from server.residency import Residency

SIZES = (10, 20, 30, 40)


class Loader:
    def __init__(self, budget_bytes: int | None) -> None:
        self.loaded: list[int] = []
        self.residency = Residency(self._load, self.size_bytes, budget_bytes)

    def _load(self, point: int) -> str:
        self.loaded.append(point)
        return f"point {point}"

    @staticmethod
    def size_bytes(points: Iterable[int]) -> int:
        return sum(SIZES[point] for point in points)


def test_a_point_is_loaded_once_while_it_fits() -> None:
    loader = Loader(100)

    for point in (0, 1, 0, 2, 1, 3):
        assert loader.residency.get(point) == f"point {point}"

    assert loader.loaded == [0, 1, 2, 3]


def test_the_least_recently_used_makes_room() -> None:
    loader = Loader(60)

    for point in (0, 1, 2, 0, 3):
        loader.residency.get(point)

    assert loader.residency.resident == (0, 3)
    loader.residency.get(1)
    assert loader.loaded == [0, 1, 2, 3, 1]


def test_without_a_budget_all_stay() -> None:
    loader = Loader(None)

    for point in (0, 1, 2, 3, 0, 1):
        loader.residency.get(point)

    assert loader.loaded == [0, 1, 2, 3]


@given(st.lists(st.integers(0, 3)), st.integers(0, 120))
def test_the_budget_holds_unless_one_point_exceeds_it(uses: list[int], budget_bytes: int) -> None:
    loader = Loader(budget_bytes)

    for point in uses:
        loader.residency.get(point)
        resident = loader.residency.resident
        assert resident[-1] == point
        assert len(resident) == 1 or loader.size_bytes(resident) <= budget_bytes
