"""What the comparison of training steps counts, on small batches: not how fast they are."""

from functools import partial
from random import Random

import torch

from benchmarks.training import KINDS, NETWORKS, compared, interleaved, make, step_of
from maestro_core.factorize import low_rank_layers


def test_every_kind_is_timed_once_a_round_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    now = iter(range(1000))
    steps = {kind: partial(calls.append, kind) for kind in KINDS}

    times = interleaved(steps, 4, Random(0), lambda: float(next(now)))

    rounds = [calls[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(r) == sorted(KINDS) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1, "the order never changed"
    assert times == {kind: [1.0] * 4 for kind in KINDS}


def test_a_step_trains_the_network_that_it_times() -> None:
    for kind in KINDS:
        model = make(NETWORKS[-1], kind)
        before = [p.detach().clone() for p in model.parameters()]

        step_of(model, kind, "float32", 2)()

        assert any(
            not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)
        ), kind
        halved = {"dense": [], "ordered": [128, 128, 128], "ordered_half_rank": [64, 64, 64]}[kind]
        assert [layer.rank for layer in low_rank_layers(model).values()][:3] == halved


def test_a_ratio_of_itself_is_in_the_result() -> None:
    row = compared(NETWORKS[1], batch=2, rounds=2)

    assert row["n"] == 2
    assert row["total_rank"]["ordered_half_rank"] <= row["total_rank"]["ordered"] / 2
    assert row["macs_over_dense"]["ordered"]["in_the_cheaper_form"] == 1.0
    for name in ("ordered_over_dense", "half_over_dense", "half_over_ordered"):
        assert 0 < row[name]["p5"] <= row[name]["p50"] <= row[name]["p95"]
