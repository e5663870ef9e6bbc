"""Which layers a step cuts: each way by its definition."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_core import lod
from maestro_core.sampling import Sampling, draw

WAYS: tuple[Sampling, ...] = ("pairs", "layers", "ratio")


def test_pairs_are_what_the_paper_draws() -> None:
    drawn = [draw("pairs", (3, 0, 8), Random(seed)) for seed in range(50)]

    assert drawn == [dict([lod.sample((3, 0, 8), Random(seed))]) for seed in range(50)]


def test_layers_are_as_likely_whatever_their_rank() -> None:
    rng = Random(0)

    drawn = Counter(next(iter(draw("layers", (1, 0, 99), rng))) for _ in range(2_000))

    assert set(drawn) == {0, 2}
    assert abs(drawn[0] - 1_000) < 4 * 500**0.5  # four standard deviations


def test_one_ratio_cuts_all_layers_that_have_a_rank() -> None:
    rng = Random(0)

    drawn = [draw("ratio", (4, 0, 25), rng) for _ in range(2_000)]

    assert {tuple(cut) for cut in drawn} == {(0, 2)}
    assert {cut[2] for cut in drawn} == set(range(1, 26))
    for cut in drawn:
        assert (cut[0] - 1) / 4 < cut[2] / 25 <= cut[0] / 4, "it is not the ratio, rounded up"


@given(st.sampled_from(WAYS), st.lists(st.integers(0, 2048), min_size=1, max_size=8), st.integers())
def test_a_cut_layer_keeps_a_rank_that_it_has(way: Sampling, ranks: list[int], seed: int) -> None:
    if sum(ranks) == 0:
        with pytest.raises(ValueError, match="at rank 0: nothing to sample"):
            draw(way, ranks, Random(seed))
        return

    drawn = draw(way, ranks, Random(seed))

    assert drawn
    assert all(1 <= rank <= ranks[index] for index, rank in drawn.items())
