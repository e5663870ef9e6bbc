"""Rank choice: against exhaustive search on small tables, and by laws."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_core.artifact import Layer
from maestro_core.frontier import (
    RankTable,
    allowed_ranks,
    monotone,
    nested_chain,
    pareto,
    refine,
    spread,
)


@st.composite
def tables(draw: st.DrawFn) -> RankTable:
    ranks = sorted(draw(st.sets(st.integers(1, 20), min_size=1, max_size=5)))
    size = len(ranks)
    costs = draw(st.lists(st.integers(1, 50), min_size=size, max_size=size))
    errors = draw(st.lists(st.integers(-5, 40), min_size=size, max_size=size))
    return RankTable(tuple(ranks), tuple(sorted(costs)), tuple(errors))


def total(chosen: tuple[int, ...], nets: list[RankTable]) -> tuple[float, float]:
    """Return the summed cost and (monotone) error of one rank per layer."""
    at = [table.ranks.index(rank) for rank, table in zip(chosen, nets, strict=True)]
    cost = sum(table.costs[i] for i, table in zip(at, nets, strict=True))
    return cost, sum(monotone(table.errors)[i] for i, table in zip(at, nets, strict=True))


@given(st.lists(tables(), min_size=1, max_size=3))
def test_no_choice_of_ranks_beats_a_point_of_the_chain(nets: list[RankTable]) -> None:
    every = [total(chosen, nets) for chosen in product(*(table.ranks for table in nets))]

    for chosen in nested_chain(nets):
        cost, error = total(chosen, nets)
        assert error <= min(e for c, e in every if c <= cost) + 1e-9


@given(st.lists(tables(), min_size=1, max_size=6))
def test_the_chain_is_nested_and_ends_at_the_whole_network(nets: list[RankTable]) -> None:
    chain = nested_chain(nets)

    assert chain[-1] == tuple(table.ranks[-1] for table in nets)
    for less, more in pairwise(chain):
        assert all(a <= b for a, b in zip(less, more, strict=True))
        assert total(less, nets)[0] < total(more, nets)[0]


@given(st.lists(tables(), min_size=1, max_size=4))
def test_a_refined_chain_is_nested_and_goes_through_every_rank(nets: list[RankTable]) -> None:
    chain = nested_chain(nets)
    grids = [table.ranks for table in nets]

    finer = refine(chain, grids)

    assert set(chain) <= set(finer)
    for less, more in pairwise(finer):
        rises = [(grid, a, b) for grid, a, b in zip(grids, less, more, strict=True) if a != b]
        ((grid, a, b),) = rises
        assert grid.index(b) == grid.index(a) + 1


def test_the_chain_takes_the_error_that_costs_least_first() -> None:
    steep = RankTable((1, 2), (1, 2), (10, 0))
    shallow = RankTable((1, 5), (1, 2), (3, 0))

    assert nested_chain([shallow, steep]) == [(1, 1), (1, 2), (5, 2)]


def test_a_rank_above_the_hull_is_passed_over() -> None:
    table = RankTable((1, 2, 3), (1, 2, 3), (10, 9, 0))

    assert nested_chain([table]) == [(1,), (3,)]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_pareto_keeps_exactly_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    kept = pareto([cost for cost, _ in points], [score for _, score in points])

    unbeaten = {
        (cost, score)
        for cost, score in points
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)
    }
    assert [points[i] for i in kept] == sorted(unbeaten)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9))
def test_monotone_raises_as_little_as_it_must(errors: list[float]) -> None:
    smooth = monotone(errors)

    assert smooth == tuple(max(errors[i:]) for i in range(len(errors)))


@given(st.integers(1, 40), st.integers(1, 200), st.integers(2, 30))
def test_allowed_ranks_are_cheaper_than_dense_or_whole(out: int, fan_in: int, most: int) -> None:
    layer = Layer("fc", "linear", fan_in, out, (), (), (), (), 1, min(out, fan_in))

    ranks = allowed_ranks(layer, most)

    assert ranks[-1] == layer.max_rank
    assert len(ranks) <= most
    assert all(a < b for a, b in pairwise(ranks))
    assert all(r * (out + fan_in) <= out * fan_in for r in ranks[:-1])


def test_allowed_ranks_leave_none_out_when_there_is_room() -> None:
    layer = Layer("conv2", "conv2d", 6, 16, (5, 5), (1, 1), (0, 0), (1, 1), 64, 16)

    # 16 · 150 / (16 + 150) = 14.46: dense is cheaper from rank 15 on.
    assert allowed_ranks(layer, 32) == (*range(1, 15), 16)


def test_allowed_ranks_are_multiples_and_none_at_all_for_a_layer_that_may_go() -> None:
    layer = Layer("fc", "linear", 100, 100, (), (), (), (), 1, max_rank=61)

    assert allowed_ranks(layer, 32, multiple=16) == (16, 32, 48, 61)
    assert allowed_ranks(layer, 32, multiple=16, removable=True) == (0, 16, 32, 48, 61)
    assert allowed_ranks(layer, 3, removable=True) == (0, 50, 61)
    small = replace(layer, max_rank=9)
    assert allowed_ranks(small, 32, multiple=16) == (9,)


def test_allowed_ranks_of_a_layer_that_shrank_are_those_it_has() -> None:
    layer = Layer("fc", "linear", 100, 100, (), (), (), (), 1, max_rank=3)

    assert allowed_ranks(layer, 32) == (1, 2, 3)
    assert allowed_ranks(Layer("fc", "linear", 9, 9, (), (), (), (), 1, 0), 32) == (0,)


@given(st.lists(st.floats(1, 1e9), min_size=1, max_size=40, unique=True), st.integers(2, 12))
def test_spread_keeps_the_ends_and_the_count(costs: list[float], count: int) -> None:
    costs = sorted(costs)

    chosen = spread(costs, count)

    assert len(chosen) == min(count, len(costs))
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, len(costs) - 1)


def test_spread_goes_by_ratio() -> None:
    assert spread([1, 2, 4, 9, 10, 11, 12, 13, 14, 15, 16], 3) == [0, 2, 10]


def test_a_table_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 ranks, 1 costs and 2 errors"):
        RankTable((1, 2), (1,), (1, 2))
    with pytest.raises(ValueError, match="ranks must rise"):
        RankTable((2, 1), (1, 2), (1, 2))
