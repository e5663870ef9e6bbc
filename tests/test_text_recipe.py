"""A text recipe from the folder to the file of its points, on a network that trains in a second."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import nn
from typer.testing import CliRunner

from maestro_core import checkpoint, cli, sentences
from maestro_core.accounting import measure
from maestro_core.evaluation import evaluate
from maestro_core.factorize import factorize_, low_rank_layers
from maestro_core.models.transformer import Transformer
from maestro_core.recipes import running
from maestro_core.recipes.multi30k_transformer import RECIPE
from maestro_core.recipes.text import run_text
from maestro_core.schedule import Moments, Phase
from maestro_core.sentences import Corpus, example
from maestro_core.target import Target
from maestro_core.template import ExportError
from maestro_core.training import train_, train_epoch_
from tests.stops import Stops
from tests.text import write_text

VOCABULARY = 90
PHASES = (Phase("dense", 3, 1e-2), Phase("ordered", 1, 5e-3), Phase("nested", 2, 5e-3))


def network() -> nn.Module:
    return Transformer(VOCABULARY, width=24, layers=1, heads=2, hidden=32)


SMALL = replace(
    RECIPE,
    network=network,
    splits=("train", "val", "test"),
    vocabulary=VOCABULARY,
    training=replace(RECIPE.training, phases=PHASES, batch_size=16),
    search=replace(RECIPE.search, points=4, least_macs=0.0, probes=3, samples=20),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "animals")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return sentences.load(folder, SMALL.languages, SMALL.splits, VOCABULARY)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    path = tmp_path_factory.mktemp("out")
    assert run_text(SMALL, folder, path, Progress(disable=True)) is not None
    return path


def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "multi30k-transformer-points.json").read_text())
    return content


def test_a_recipe_writes_its_points_and_has_learnt(out: Path, corpus: Corpus) -> None:
    found = report(out)

    assert found["test"] == {"split": "test", "sentences": 80, "tokens": found["test"]["tokens"]}
    assert len(found["points"]) >= 2
    best = found["points"][-1]
    assert best["low"] < best["perplexity"] < best["high"]
    assert best["perplexity"] < VOCABULARY / 5
    for point in found["points"]:
        assert len(point["ranks"]) == len(found["layers"]) == 17
        assert point["params"] == point["embedding_params"] + point["linear_params"]
    assert found["dense"]["embedding_params"] == VOCABULARY * 24
    assert found["provenance"]["data_sha256"] == corpus.sha256
    assert (out / "multi30k-transformer-tokenizer.model").read_bytes() == corpus.tokenizer


def test_the_points_are_those_of_the_checkpoint(out: Path, corpus: Corpus) -> None:
    path = checkpoint.latest(out / "multi30k-transformer-checkpoints")
    assert path is not None
    model = network()
    factorize_(model)
    checkpoint.restore_(path, model, None, checkpoint.read_state(path).run)

    for point in report(out)["points"]:
        ranks = dict(zip(report(out)["layers"], point["ranks"], strict=True))
        assert evaluate(model, corpus.test, ranks).perplexity == pytest.approx(
            point["perplexity"], rel=1e-5
        )


def test_running_again_changes_nothing(out: Path, folder: Path) -> None:
    before = report(out)

    run_text(SMALL, folder, out, Progress(disable=True))

    assert report(out) == before


def test_a_checkpoint_of_other_text_is_refused(out: Path, tmp_path: Path) -> None:
    other = write_text(tmp_path / "animals", seed=9)

    with pytest.raises(checkpoint.CheckpointError, match=r"run\.data_sha256"):
        run_text(SMALL, other, out, Progress(disable=True))


def train(
    model: nn.Module, corpus: Corpus, root: Path, training: Any, bar: Progress | None = None
) -> None:
    def find() -> list[tuple[int, ...]]:
        whole = tuple(layer.rank for layer in low_rank_layers(model).values())
        return [tuple(min(3, r) for r in whole), tuple(min(9, r) for r in whole), whole]

    train_(model, corpus, training, find, root, {"recipe": "x"}, bar or Progress(disable=True))


@pytest.mark.parametrize("stop", [15, 35, 55])
def test_a_run_stopped_in_any_phase_ends_with_the_same_bits(
    corpus: Corpus, tmp_path: Path, stop: int
) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return network()

    training = replace(SMALL.training, lasso=1e-2, threshold=0.05)
    whole, stopped, resumed = fresh(), fresh(), fresh()
    train(whole, corpus, tmp_path / "whole", training)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, corpus, tmp_path / "cut", training, Stops(stop))
    train(resumed, corpus, tmp_path / "cut", training)

    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("proximal", [True, False])
def test_the_lasso_shrinks_the_table_too(corpus: Corpus, tmp_path: Path, proximal: bool) -> None:
    torch.manual_seed(0)
    model = network()
    training = replace(
        SMALL.training,
        phases=(Phase("ordered", 3, 3e-2),),
        lasso=0.5,
        threshold=0.1,
        proximal=proximal,
    )

    train(model, corpus, tmp_path, training)

    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    assert ranks["embedding"] < 24
    assert sum(ranks.values()) < 17 * 24 * 0.8


def test_training_to_a_size_counts_the_table(corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network()
    target = Target("params", 0.6)
    training = replace(SMALL.training, phases=(Phase("ordered", 8, 1e-2),), target=target)

    train(model, corpus, tmp_path, training)

    cost = measure(model, example(corpus.train))
    share = target.of(cost, [layer.max_rank for layer in cost.layers])
    assert 0.95 <= share / 0.6 <= 1.05


def test_the_recipe_starts_and_takes_steps(corpus: Corpus) -> None:
    hyper = replace(RECIPE.training, batch_size=4)
    model = Transformer(VOCABULARY, width=64, layers=6, heads=8, hidden=128)
    factorize_(model)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    ordered = next(phase for phase in hyper.phases if phase.kind == "ordered")
    first = sum(p.epochs for p in hyper.phases[: hyper.phases.index(ordered)])

    steps: list[int] = []
    # Halfway, where no rate is 0.
    epoch = first + ordered.epochs // 2
    train_epoch_(model, optimizer, corpus.train.first(8), hyper, epoch, [], lambda: steps.append(0))

    assert len(steps) == 2
    pairs = zip(model.parameters(), before, strict=True)
    assert any(not torch.equal(now, then) for now, then in pairs)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


class Unused(Transformer):
    """A transformer with a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, width=24, layers=1, heads=2, hidden=32)
        self.aux = nn.Linear(24, 24)


def test_a_network_that_has_no_points_is_refused_before_training(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="layer 'aux' is factorised but never called"):
        run_text(replace(SMALL, network=Unused), folder, tmp_path, Progress(disable=True))
    removing = replace(SMALL, search=replace(SMALL.search, removable=("side.*",)))
    with pytest.raises(ValueError, match=r"removable: 'side\.\*' matches no layer"):
        run_text(removing, folder, tmp_path, Progress(disable=True))
    assert not list(tmp_path.iterdir())


def test_text_is_not_exported_and_the_message_says_what_there_is(
    out: Path, folder: Path, tmp_path: Path
) -> None:
    path = checkpoint.latest(out / "multi30k-transformer-checkpoints")
    assert path is not None

    with pytest.raises(ExportError, match="reads text, which an artifact can't hold yet"):
        running.export(path, folder, tmp_path / "x.maestro")


def test_a_target_is_taken_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "RECIPES", {SMALL.name: SMALL})
    asked: list[Target | None] = []

    def note(recipe: Any, *_: Any) -> Path:
        asked.append(recipe.training.target)
        return tmp_path

    monkeypatch.setattr(running, "run_text", note)

    running.run(SMALL.name, folder, tmp_path, Target("params", 0.5))

    assert asked == [Target("params", 0.5)]


def test_the_program_shows_the_points(
    out: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "RECIPES", {SMALL.name: SMALL})

    done = CliRunner().invoke(
        cli.app, ["train", SMALL.name, "--data", str(folder), "--out", str(out)]
    )

    assert done.exit_code == 0, done.output
    for point in report(out)["points"]:
        assert f"{point['perplexity']:.2f}" in done.output
    assert "points.json" in done.output


def test_momentum_is_not_adams() -> None:
    with pytest.raises(ValueError, match=r"momentum is SGD's: with adam it is 0, not 0\.9"):
        replace(RECIPE.training, momentum=0.9, adam=Moments((0.9, 0.98), 1e-9))
