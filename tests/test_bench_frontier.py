"""Every method on a network that trains in a second: the same budget, scores, resuming, figures."""

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks import frontier
from benchmarks.methods import ABLATIONS, METHODS, Bench, Task, correct, scaled, uniform_chain
from maestro_core import checkpoint
from maestro_core.accounting import Cost
from maestro_core.data import Pictures
from maestro_core.evaluation import evaluate
from maestro_core.factorize import factorize_
from maestro_core.recipes.mnist_lenet import RECIPE
from maestro_core.schedule import Phase
from tests.conftest import TINY_LAYERS
from tests.test_recipes import write_digits

PHASES = (Phase("dense", 1, 0.02), Phase("ordered", 1, 0.02), Phase("nested", 1, 0.02))


class Net(nn.Module):
    def __init__(self, width: float) -> None:
        super().__init__()
        channels = round(16 * width)
        self.conv = nn.Conv2d(1, channels, 7, stride=3, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels * 64, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(1)
        logits: Tensor = self.head(self.fc(x).relu())
        return logits


TASK = Task(
    recipe=replace(
        RECIPE,
        validation=100,
        training=replace(RECIPE.training, phases=PHASES, batch_size=32),
        search=replace(RECIPE.search, probes=4, points=3, least_macs=0.0),
    ),
    network=Net,
    width=1.0,
    narrower=(0.5,),
    kept=("head",),
    epochs=3,
    samples=800,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("frontier")
    data = frontier.load(TASK, write_digits(root / "squares.npz"))
    return Bench(TASK, data, root, Progress(disable=True))


@pytest.fixture(scope="module")
def made(bench: Bench) -> dict[str, dict[str, object]]:
    return {name: frontier.kept(bench, name) for name in METHODS}


def rows(made: dict[str, dict[str, object]], name: str) -> list[dict[str, Any]]:
    found = made[name]["rows"]
    assert isinstance(found, list)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("made")
def test_all_methods_train_for_as_many_epochs_on_as_many_pictures(bench: Bench) -> None:
    runs = {path.parent.name: path for path in bench.root.glob("*/epoch-*")}

    trained = {"dense-1", "dense-0.5", "ordered_dropout", "pufferfish", "maestro"}
    assert set(runs) == {*trained, *ABLATIONS}
    assert {path.name for path in runs.values()} == {"epoch-0003"}
    states = [checkpoint.read_state(path).run for path in runs.values()]
    assert {state["samples"] for state in states} == {800}
    assert {state["data_sha256"] for state in states} == {bench.data.sha256}


@pytest.mark.slow
def test_costs_are_those_of_the_networks(made: dict[str, dict[str, object]]) -> None:
    (dense,) = rows(made, "dense")
    (narrow,) = rows(made, "narrower")
    (int8,) = rows(made, "int8")
    (quarter,) = rows(made, "pufferfish")

    assert dense["macs"] == 16 * 49 * 64 + 16 * 64 * 24 + 240
    assert narrow["macs"] == 8 * 49 * 64 + 8 * 64 * 24 + 240
    assert (int8["macs"], int8["params"]) == (dense["macs"], dense["params"])
    assert quarter["ranks"] == [4, 6]
    assert quarter["macs"] == 4 * (16 + 49) * 64 + 6 * (16 * 64 + 24) + 240
    for name in METHODS:
        assert all(b["macs"] > a["macs"] for a, b in pairwise(rows(made, name)))


@pytest.mark.slow
def test_a_score_is_what_torch_says(bench: Bench, made: dict[str, dict[str, object]]) -> None:
    model = bench.network(1.0)
    path = checkpoint.latest(bench.root / "dense-1")
    assert path is not None
    checkpoint.restore_(path, model, None, checkpoint.read_state(path).run)

    test = bench.data.test
    assert isinstance(test, Pictures)
    expected = evaluate(model, test)

    assert rows(made, "dense")[0]["accuracy"] == expected.accuracy > 0.8
    assert correct(bench.root / "dense-1.onnx", test) == expected.correct
    assert rows(made, "int8")[0]["accuracy"] > expected.accuracy - 0.05
    assert rows(made, "maestro")[-1]["accuracy"] > 0.8


@pytest.mark.slow
def test_a_method_that_is_done_is_kept_and_another_task_refused(
    bench: Bench, made: dict[str, dict[str, object]]
) -> None:
    again = frontier.kept(bench, "pufferfish")
    other = replace(bench, task=replace(TASK, epochs=4))

    assert again == made["pufferfish"]
    with pytest.raises(ValueError, match=r"pufferfish\.json is of another task"):
        frontier.kept(other, "pufferfish")


@pytest.mark.slow
def test_the_program_writes_latencies_comparison_and_picture(
    bench: Bench, made: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    timed = frontier.with_latencies(bench.root, made, threads=1, budget_s=0.5)
    frontier.draw(timed, "squares", tmp_path / "frontier.png")

    assert set(timed) == set(METHODS)
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for found in timed.values() for row in found)
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    json.dumps(frontier.against(timed["maestro"], timed))


def test_costs_are_compared_at_no_less_accuracy() -> None:
    def row(accuracy: float, cost: float) -> dict[str, float]:
        return {"accuracy": accuracy, "macs": cost, "params": cost, "p50_ms": cost}

    found = frontier.against(
        [row(0.8, 2.0), row(0.9, 3.0)], {"rival": [row(0.85, 4.0), row(0.95, 1)]}
    )

    assert [point["macs"] for point in found["rival"]] == [0.75, None]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=3), st.integers(3, 50))
def test_scaled_phases_keep_about_their_shares(counts: list[int], epochs: int) -> None:
    phases = [Phase("dense", count, 0.1) for count in counts]

    found = [phase.epochs for phase in scaled(phases, epochs)]

    assert sum(found) == epochs
    assert min(found) >= 1
    for have, count in zip(found, counts, strict=True):
        assert abs(have - count * epochs / sum(counts)) < len(counts)


def test_fewer_epochs_than_phases_are_refused() -> None:
    with pytest.raises(ValueError, match="3 phases need as many epochs, not 2"):
        scaled(PHASES, 2)


def test_too_few_epochs_for_our_phases_are_refused_before_a_rival_is_trained(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=r"--epochs is 1, not \d or more: the method maestro"):
        frontier.main(["--data", str(tmp_path / "none"), "--epochs", "1"])
    frontier.check_epochs(replace(TASK, epochs=1), ["dense", "svd"])


def test_uniform_points_are_nested_and_their_ranks_allowed() -> None:
    chain = uniform_chain(Cost(TINY_LAYERS, 0, 0))

    assert chain[-1] == tuple(layer.max_rank for layer in TINY_LAYERS)
    for less, more in pairwise(chain):
        assert all(a <= b for a, b in zip(less, more, strict=True))
    for ranks in chain:
        for layer, rank in zip(TINY_LAYERS, ranks, strict=True):
            assert 1 <= rank == layer.max_rank or not layer.is_dense(rank)


@pytest.mark.parametrize("name", frontier.TASKS)
def test_a_task_has_an_epoch_for_each_phase(name: str) -> None:
    task = frontier.TASKS[name]

    phases = scaled(task.recipe.training.phases, task.epochs)

    assert sum(phase.epochs for phase in phases) == task.epochs


@pytest.mark.parametrize("name", frontier.TASKS)
def test_the_layers_that_a_task_keeps_dense_are_its_network_s(name: str) -> None:
    task = frontier.TASKS[name]

    done = factorize_(task.network(task.width), task.kept)

    named = {
        name
        for name in (*done.low_rank, *done.dense)
        if any(fnmatchcase(name, pattern) for pattern in task.kept)
    }
    assert {name for name, reason in done.dense.items() if reason == "kept"} == named


def test_methods_that_have_no_points_have_no_latencies(tmp_path: Path) -> None:
    made: dict[str, dict[str, Any]] = {"svd_recalibrated": {"rows": []}}

    assert frontier.with_latencies(tmp_path, made, 1, 1.0) == {"svd_recalibrated": []}
