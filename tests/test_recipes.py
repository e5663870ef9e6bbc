"""A recipe from data file to artifact, on a network that trains in a second."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

from maestro_core import artifact, checkpoint, folders, held_out
from maestro_core.data import DataError, Pictures, load
from maestro_core.factorize import factorize_, low_rank_layers
from maestro_core.folders import Folders
from maestro_core.models.resnet import ResNet50
from maestro_core.recipes import running
from maestro_core.recipes.mnist_lenet import RECIPE
from maestro_core.recipes.recipe import Recipe
from maestro_core.schedule import Phase, learning_rate
from maestro_core.target import Target
from maestro_core.template import ExportError
from maestro_core.training import train_epoch_
from tests.test_folders import CLASSES, write_folders

SMALL = replace(
    RECIPE,
    validation=200,
    kept_samples=150,
    training=replace(
        RECIPE.training,
        phases=(Phase("ordered", 8, 0.007), Phase("nested", 2, 0.007)),
        batch_size=16,
    ),
    search=replace(RECIPE.search, probes=6, least_macs=0.0),
)


def write_digits(path: Path, labels_of_test: int = 1) -> Path:
    """Write 1,200 pictures whose label is where the bright square is."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, n in (("train", 1_000), ("test", 200)):
        y = rng.integers(0, 10, n)
        x = rng.integers(0, 120, (n, 28, 28))
        for i, label in enumerate(y):
            row, column = 6 + 10 * (label // 5), 2 + 5 * (label % 5)
            x[i, row : row + 5, column : column + 5] += 100
        arrays[f"x_{part}"], arrays[f"y_{part}"] = x.astype(np.uint8), y.astype(np.uint8)
    arrays["y_test"] = (arrays["y_test"] * labels_of_test) % 10
    np.savez(path, **arrays)
    return path


def run(data: Path, out: Path) -> artifact.Artifact:
    path = running.run_recipe(SMALL, data, out, Progress(disable=True))
    assert path is not None
    return artifact.load(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "squares.npz")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    path = tmp_path_factory.mktemp("out")
    run(data, path)
    return path


def test_a_recipe_makes_an_artifact_whose_best_point_has_learnt(out: Path) -> None:
    made = artifact.load(out / "mnist-lenet.maestro")

    assert made.points[-1].score.value > 0.9
    assert len(made.points) >= 2
    assert made.manifest.dense_macs == 281_640
    assert made.manifest.metric.data_set == "MNIST test"
    provenance = made.manifest.provenance
    assert (provenance["recipe"], provenance["seed"], provenance["epochs"]) == (
        "mnist-lenet",
        0,
        10,
    )
    assert provenance["data_set"] == "MNIST, LeCun et al., CC BY-SA 3.0"
    assert len(held_out.read_samples(made).labels) == 150
    assert provenance["packages"]["torch"] == torch.__version__


def test_running_again_makes_the_same_artifact_without_training(out: Path, data: Path) -> None:
    before = artifact.load(out / "mnist-lenet.maestro")

    assert run(data, out).digest == before.digest


def test_export_alone_makes_the_same_artifact(
    out: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "RECIPES", {SMALL.name: SMALL})
    last = checkpoint.latest(out / "mnist-lenet-checkpoints")
    assert last is not None

    path = running.export(last, data, tmp_path / "alone.maestro")

    assert artifact.load(path).digest == artifact.load(out / "mnist-lenet.maestro").digest


def test_a_checkpoint_of_a_dense_phase_is_exported(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = replace(SMALL, training=replace(SMALL.training, phases=(Phase("dense", 1, 0.007),)))
    monkeypatch.setattr(running, "RECIPES", {dense.name: dense})
    trained = running.run(dense.name, data, tmp_path)
    last = checkpoint.latest(tmp_path / "mnist-lenet-checkpoints")
    assert trained is not None
    assert last is not None

    alone = running.export(last, data, tmp_path / "alone.maestro")

    assert artifact.load(alone).digest == artifact.load(trained).digest


def test_test_labels_score_but_never_choose(out: Path, tmp_path: Path) -> None:
    data = write_digits(tmp_path / "squares.npz", labels_of_test=3)

    other = run(data, tmp_path / "out").points

    ours = artifact.load(out / "mnist-lenet.maestro").points
    assert [point.ranks for point in other] == [point.ranks for point in ours]
    assert [point.score for point in other] != [point.score for point in ours]


def test_a_checkpoint_of_other_data_is_refused(out: Path, tmp_path: Path) -> None:
    data = write_digits(tmp_path / "squares.npz", labels_of_test=3)

    with pytest.raises(checkpoint.CheckpointError, match=r"run\.data_sha256"):
        run(data, out)


def test_a_checkpoint_of_otherwise_normalised_pictures_is_refused(out: Path, data: Path) -> None:
    changed = replace(SMALL, image=replace(SMALL.image, mean=(0.5,)))

    with pytest.raises(checkpoint.CheckpointError, match=r"run\.image"):
        running.run_recipe(changed, data, out, Progress(disable=True))


def test_an_unknown_recipe_or_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recipe 'vgg'; there are: mnist-lenet"):
        running.run("vgg", tmp_path / "none.npz", tmp_path)
    with pytest.raises(DataError, match=r"none\.npz: no such file"):
        running.run("mnist-lenet", tmp_path / "none.npz", tmp_path)
    assert not list(tmp_path.iterdir())


def test_recipes_say_what_they_are() -> None:
    assert "digits" in running.summaries()["mnist-lenet"]


@pytest.mark.slow
def test_a_recipe_with_a_target_makes_points_up_to_it_and_is_exported_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "RECIPES", {SMALL.name: SMALL})

    path = running.run(SMALL.name, data, tmp_path, Target("macs", 0.5))

    assert path is not None
    made = artifact.load(path)
    last = checkpoint.latest(tmp_path / "mnist-lenet-checkpoints")
    assert last is not None
    ranks = checkpoint.read_state(last).ranks
    macs = sum(layer.macs(ranks[layer.name]) for layer in made.manifest.layers)
    assert 0.95 <= macs / (0.5 * 281_640) <= 1.05
    assert all(point.macs <= macs for point in made.points)
    alone = running.export(last, data, tmp_path / "alone.maestro")
    assert artifact.load(alone).digest == made.digest


@pytest.mark.parametrize("name", ["cifar10-small", "cifar10-resnet18", "cifar10-vgg19"])
def test_a_recipe_for_larger_networks_starts_and_takes_steps(name: str, tmp_path: Path) -> None:
    recipe = running.RECIPES[name]
    assert isinstance(recipe, Recipe)
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        f"{kind}_{part}": rng.integers(0, top, shape).astype(np.uint8)
        for part in ("train", "test")
        for kind, top, shape in (("x", 256, (12, 32, 32, 3)), ("y", 10, (12,)))
    }
    np.savez(tmp_path / "noise.npz", **arrays)
    loaded = load(tmp_path / "noise.npz", recipe.image, 10, 4, 0, recipe.augmentation)

    take_two_steps(recipe, loaded.train)


IMAGENET = ["imagenet-resnet50", "imagenet-resnet50-partial"]


def small(name: str) -> Recipe:
    """Return a recipe for ImageNet with an eighth of the width, of pictures that are smaller."""
    recipe = running.RECIPES[name]
    assert isinstance(recipe, Recipe)
    return replace(
        recipe,
        network=lambda: ResNet50(len(CLASSES), width=1 / 8),
        image=replace(recipe.image, height=32, width=32, shorter=36),
        folders=Folders(len(CLASSES)),
        validation=9,
    )


@pytest.mark.parametrize("name", IMAGENET)
def test_a_recipe_for_imagenet_starts_and_takes_steps(name: str, tmp_path: Path) -> None:
    recipe = small(name)
    root = write_folders(tmp_path / "data", {"train": 6, "val": 1})
    assert recipe.folders
    loaded = folders.load(root, recipe.image, recipe.folders, 10, 0, 2, lambda *_: None)

    model = take_two_steps(recipe, loaded.train)

    found = list(low_rank_layers(model))
    convolutions = 54 if name == "imagenet-resnet50" else 10
    assert len(found) == convolutions
    assert convolutions == 54 or all(layer.startswith("stages.3.") for layer in found)


@pytest.mark.parametrize("name", IMAGENET)
def test_the_schedule_for_imagenet_is_that_of_the_paper(name: str) -> None:
    hyper = running.RECIPES[name].training
    (phase,) = hyper.phases

    rates = [round(learning_rate(phase, hyper.warmup, epoch), 9) for epoch in range(90)]

    assert rates == [*[0.1] * 30, *[0.01] * 30, *[0.001] * 20, *[0.0001] * 10]
    assert (hyper.batch_size, hyper.momentum, hyper.weight_decay) == (256, 0.9, 1e-4)


def take_two_steps(recipe: Recipe, pictures: Pictures) -> nn.Module:
    """Train on 8 pictures, 4 a step, halfway through the ordered phase, where no rate is 0."""
    hyper = replace(recipe.training, batch_size=4)
    model = recipe.network()
    factorize_(model, hyper.keep)
    ordered = next(phase for phase in hyper.phases if phase.kind == "ordered")
    first = sum(p.epochs for p in hyper.phases[: hyper.phases.index(ordered)])
    optimizer = torch.optim.SGD(model.parameters(), momentum=hyper.momentum)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    steps: list[int] = []

    epoch = first + ordered.epochs // 2
    train_epoch_(model, optimizer, pictures, hyper, epoch, [], lambda: steps.append(0))

    assert len(steps) == 2
    assert any(not torch.equal(before[k], value) for k, value in model.state_dict().items())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    return model


def test_a_recipe_for_folders_makes_an_artifact_with_their_names(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", {"train": 24, "val": 10})
    recipe = small("imagenet-resnet50-partial")
    recipe = replace(
        recipe,
        training=replace(
            recipe.training, phases=(Phase("ordered", 2, 0.05),), batch_size=9, target=None
        ),
        search=replace(recipe.search, points=3, probes=3),
    )

    path = running.run_recipe(recipe, root, tmp_path / "out", Progress(disable=True))

    assert path is not None
    manifest = artifact.load(path).manifest
    assert manifest.labels == CLASSES
    assert manifest.input.image == recipe.image
    assert (manifest.metric.data_set, manifest.metric.samples) == ("ImageNet-1k validation", 30)
    assert manifest.provenance["folders"]["classes"] == 3


class Unused(nn.Module):
    """A network with a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        self.aux = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


class Single(Unused):
    """A network that takes one picture alone."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x.view(1, -1)) + self.aux(x.view(1, -1))
        return logits


def test_a_network_that_has_no_points_is_refused_before_training(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="layer 'aux' is factorised but never called"):
        running.run_recipe(replace(SMALL, network=Unused), data, tmp_path, Progress(disable=True))
    with pytest.raises(ExportError, match=r"the network fails on a batch of 2: mat1 and mat2"):
        running.run_recipe(replace(SMALL, network=Single), data, tmp_path, Progress(disable=True))
    kept = replace(SMALL, training=replace(SMALL.training, keep=("*",)))
    with pytest.raises(ExportError, match=r"no layer .* in two factors: nothing to order"):
        running.run_recipe(kept, data, tmp_path, Progress(disable=True))
    removing = replace(SMALL, search=replace(SMALL.search, removable=("side.*",)))
    with pytest.raises(ValueError, match=r"removable: 'side\.\*' matches no layer"):
        running.run_recipe(removing, data, tmp_path, Progress(disable=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["my net", "", ".net", "net/1", "net\n"])
def test_a_name_that_no_artifact_can_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"a name is \^\[A-Za-z0-9\]"):
        replace(RECIPE, name=name)


def test_a_recipe_is_not_given_the_other_kind_of_data(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"squares\.npz: a file; this recipe reads a folder"):
        running.run("imagenet-resnet50", data, tmp_path)
    with pytest.raises(DataError, match=r"a folder; this recipe reads an \.npz file"):
        running.run("mnist-lenet", tmp_path, tmp_path)


def test_labels_are_given_or_named_by_folders() -> None:
    with pytest.raises(ValueError, match="'mnist-lenet': give labels, or folders that name them"):
        replace(RECIPE, labels=())


def test_what_only_the_export_would_refuse_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="'mnist-lenet': a label is a string, not 0"):
        replace(RECIPE, labels=tuple(range(10)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'mnist-lenet': kept_samples is -3, under 0"):
        replace(RECIPE, kept_samples=-3)


@pytest.mark.parametrize(
    ("device", "message"), [("cuda", "finds no CUDA GPU here"), ("gpu", "cpu or cuda, not 'gpu'")]
)
def test_a_device_that_is_not_there_is_refused(
    data: Path, tmp_path: Path, device: str, message: str
) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")

    with pytest.raises(ValueError, match=message):
        running.run("mnist-lenet", data, tmp_path, device=device)
    assert not list(tmp_path.iterdir())
