"""The methods on text: the same budget, parameters counted apart, perplexities, resuming."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from benchmarks import frontier
from benchmarks.frontier import PERPLEXITY, SMALL_TRANSFORMER, TASKS
from benchmarks.methods import METHODS, TEXT, Bench, Task
from maestro_core import checkpoint
from maestro_core.evaluation import evaluate
from maestro_core.models.transformer import Transformer
from maestro_core.recipes.recipe import TextRecipe
from maestro_core.schedule import Phase
from tests.text import write_text

VOCABULARY = 90
PHASES = (Phase("dense", 1, 1e-2), Phase("ordered", 1, 5e-3), Phase("nested", 1, 5e-3))
TASK = Task(
    recipe=replace(
        SMALL_TRANSFORMER,
        splits=("train", "val", "test"),
        vocabulary=VOCABULARY,
        training=replace(SMALL_TRANSFORMER.training, phases=PHASES, batch_size=16),
        search=replace(SMALL_TRANSFORMER.search, probes=3, points=3, least_macs=0.0, samples=20),
    ),
    network=lambda width: Transformer(
        VOCABULARY, round(24 * width), layers=2, heads=2, hidden=round(48 * width)
    ),
    width=1.0,
    narrower=(0.5,),
    kept=TASKS["multi30k"].kept,
    epochs=3,
    samples=96,
)
TABLE = VOCABULARY * 24
MATRICES = 2 * (3 * 4 * 24 * 24 + 2 * 2 * 24 * 48)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("frontier")
    data = frontier.load(TASK, write_text(root / "animals"))
    return Bench(TASK, data, root, Progress(disable=True))


@pytest.fixture(scope="module")
def made(bench: Bench) -> dict[str, dict[str, Any]]:
    return {name: frontier.kept(bench, name) for name in TEXT}


@pytest.mark.slow
@pytest.mark.usefixtures("made")
def test_all_methods_train_for_as_many_epochs_on_as_many_sentences(bench: Bench) -> None:
    runs = {path.parent.name: path for path in bench.root.glob("*/epoch-*")}

    assert set(runs) == {"dense-1", "dense-0.5", "pufferfish", "maestro"}
    assert {path.name for path in runs.values()} == {"epoch-0003"}
    states = [checkpoint.read_state(path).run for path in runs.values()]
    assert {state["samples"] for state in states} == {96}


@pytest.mark.slow
def test_parameters_are_counted_apart_and_macs_are_those_of_28_tokens(
    made: dict[str, dict[str, Any]],
) -> None:
    (dense,) = made["dense"]["rows"]
    (quarter,) = made["pufferfish"]["rows"]

    assert dense["embedding_params"] == quarter["embedding_params"] == TABLE
    assert dense["macs"] == (MATRICES + TABLE) * 28
    first = MATRICES // 2
    second = 3 * 4 * 6 * 48 + 2 * 2 * 6 * 72  # at rank 6 of 24
    assert quarter["macs"] == (first + second + TABLE) * 28
    assert dense["linear_params"] - quarter["linear_params"] == first - second
    for name in TEXT:
        rows = made[name]["rows"]
        assert all(b["macs"] > a["macs"] for a, b in pairwise(rows)), name
        assert all(b["validation"] < a["validation"] for a, b in pairwise(rows)), name
        assert all(row["low"] < row["perplexity"] < row["high"] for row in rows), name
    assert any(row["embedding_params"] < TABLE for row in made["maestro"]["rows"])


@pytest.mark.slow
def test_a_perplexity_is_what_the_checkpoint_has(
    bench: Bench, made: dict[str, dict[str, Any]]
) -> None:
    model = bench.network(1.0)
    path = checkpoint.latest(bench.root / "dense-1")
    assert path is not None
    checkpoint.restore_(path, model, None, checkpoint.read_state(path).run)

    expected = evaluate(model, bench.data.test).perplexity

    assert made["dense"]["rows"][0]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert expected < VOCABULARY / 2


@pytest.mark.slow
def test_a_method_that_is_done_is_kept(bench: Bench, made: dict[str, dict[str, Any]]) -> None:
    assert frontier.kept(bench, "pufferfish") == made["pufferfish"]


def rows(*values: tuple[float, int]) -> list[dict[str, float]]:
    return [
        {"perplexity": perplexity, **dict.fromkeys(PERPLEXITY.costs, cost)}
        for perplexity, cost in values
    ]


def test_costs_are_compared_at_no_higher_perplexity() -> None:
    found = frontier.against(
        rows((9.0, 2), (8.0, 3)), {"rival": rows((8.5, 4), (7.0, 1))}, PERPLEXITY
    )

    assert found["rival"] == [
        {"perplexity": 8.5, **dict.fromkeys(PERPLEXITY.costs, 0.75)},
        {"perplexity": 7.0, **dict.fromkeys(PERPLEXITY.costs, None)},
    ]
    json.dumps(found)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    methods = {"maestro": rows((9.0, 200), (8.0, 300)), "dense": rows((7.5, 400)), "none": []}

    frontier.draw(methods, "animals", tmp_path / "frontier.png", PERPLEXITY)

    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_int8_is_refused_before_anything_is_trained(bench: Bench) -> None:
    with pytest.raises(ValueError, match="int8: networks of text are not exported"):
        METHODS["int8"](bench)


def test_the_task_has_a_network_of_its_vocabulary() -> None:
    task = TASKS["multi30k"]
    assert isinstance(task.recipe, TextRecipe)

    for width in (task.width, *task.narrower):
        model = task.network(width)
        assert model.get_parameter("embedding.weight").shape[0] == task.recipe.vocabulary
