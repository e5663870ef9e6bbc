"""Run a recipe: train, search, export. The steps are elsewhere; here they are joined."""

import os
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from maestro_core import artifact, checkpoint, data, distributed, folders, held_out
from maestro_core.accounting import Cost, measure
from maestro_core.data import Data
from maestro_core.export import Description
from maestro_core.export import export as export_artifact
from maestro_core.exportable import check_exportable
from maestro_core.factorize import factorize_
from maestro_core.frontier import Chain
from maestro_core.host import usable_cores
from maestro_core.recipes.cifar10_resnet18 import RECIPE as CIFAR10_RESNET18
from maestro_core.recipes.cifar10_small import RECIPE as CIFAR10_SMALL
from maestro_core.recipes.cifar10_vgg19 import RECIPE as CIFAR10_VGG19
from maestro_core.recipes.imagenet_resnet50 import RECIPE as IMAGENET_RESNET50
from maestro_core.recipes.imagenet_resnet50_partial import RECIPE as IMAGENET_RESNET50_PARTIAL
from maestro_core.recipes.mnist_lenet import RECIPE as MNIST_LENET
from maestro_core.recipes.multi30k_transformer import RECIPE as MULTI30K_TRANSFORMER
from maestro_core.recipes.recipe import Recipe, TextRecipe
from maestro_core.recipes.text import run_text
from maestro_core.search import check_removable, error_tables, find_chain, make_points
from maestro_core.target import Target
from maestro_core.template import ExportError
from maestro_core.training import cut_, start_, train_

RECIPES: dict[str, Recipe | TextRecipe] = {
    recipe.name: recipe
    for recipe in (
        MNIST_LENET,
        CIFAR10_SMALL,
        CIFAR10_RESNET18,
        CIFAR10_VGG19,
        IMAGENET_RESNET50,
        IMAGENET_RESNET50_PARTIAL,
        MULTI30K_TRANSFORMER,
    )
}


def summaries() -> dict[str, str]:
    """Return what each recipe is, by name."""
    return {name: recipe.summary for name, recipe in RECIPES.items()}


def run(
    name: str, data_path: Path, out: Path, target: Target | None = None, device: str = "cpu"
) -> Path | None:
    """Train the recipe `name`, or go on where it stopped; return the artifact, in `out`.

    `device` is cpu or cuda. With a target the network is trained to that size, and its points are
    all up to it. Of several processes the first makes the artifact, and the others return None.
    Of text, which no artifact can hold yet, it is a JSON file of the points.
    Checkpoints are in `out/NAME-checkpoints`. Progress is shown on standard error.

    Raises:
        ValueError: no such recipe or device, wrong data, another run's checkpoint, or a disk that
            is full; each says which.
        Diverged: the loss is no longer finite.
        TargetMissed: the target can't be reached, or was not.
    """
    recipe = _aimed(_recipe(name), target)
    chosen = _device(device)
    with distributed.joined():
        if isinstance(recipe, TextRecipe):
            return run_text(recipe, data_path, out, _progress(), chosen)
        return run_recipe(recipe, data_path, out, _progress(), chosen)


def export(path: Path, data_path: Path, out: Path, device: str = "cpu") -> Path:
    """Search and export the checkpoint at `path`; return the artifact `out`.

    `device` is cpu or cuda.

    Raises:
        ValueError: the checkpoint is of no recipe here, or of other data or hyper-parameters, or
            there is no such device.
        ArtifactError: something else is at `out`.
        ExportError: it is of a recipe for text.
    """
    chosen = _device(device)
    artifact.check_replaceable(out)
    state = checkpoint.read_state(path)
    aim = state.run.get("target")
    recipe = _aimed(_recipe(str(state.run.get("recipe"))), Target(**aim) if aim else None)
    if isinstance(recipe, TextRecipe):
        raise ExportError(
            f"{recipe.name} reads text, which an artifact can't hold yet: `maestro train` writes "
            f"its points into {recipe.name}-points.json"
        )
    with _progress() as progress:
        loaded = _load(recipe, data_path, progress).on(chosen)
        model = _network(recipe).to(chosen)
        if state.ranks:  # else it is of a dense phase
            factorize_(model, recipe.training.keep)
        checkpoint.restore_(path, model, None, recipe.identity(loaded.sha256))
        start_(model, loaded, recipe.training)
        chain = state.chain or _find_chain(recipe, model, loaded, progress)
        cut_(model, chain[-1])
        return _export(recipe, model, loaded, chain, out, progress)


def run_recipe(
    recipe: Recipe, data_path: Path, out: Path, progress: Progress, device: torch.device = data.CPU
) -> Path | None:
    """Train `recipe` on `device`, or go on where it stopped; return the artifact, in `out`.

    Returns and raises as `run` does.
    """
    path = out / f"{recipe.name}.maestro"
    artifact.check_replaceable(path)
    with progress:
        loaded = _load(recipe, data_path, progress).on(device)
        model = _network(recipe)
        labels = recipe.labels or loaded.classes
        names = check_exportable(model, recipe.training.keep, recipe.image, len(labels))
        check_removable(recipe.search, names)
        if not names and recipe.training.ends("ordered"):
            raise ExportError("no layer of the network can be put in two factors: nothing to order")
        model.to(device)
        if recipe.prepare:
            recipe.prepare(model, loaded.train)
        chain = train_(
            model,
            loaded,
            recipe.training,
            lambda: _find_chain(recipe, model, loaded, progress),
            out / f"{recipe.name}-checkpoints",
            recipe.identity(loaded.sha256),
            progress,
        )
        if distributed.rank() > 0:
            return None
        return _export(recipe, model, loaded, chain, path, progress)


def _find_chain(recipe: Recipe, model: nn.Module, loaded: Data, progress: Progress) -> Chain:
    task = progress.add_task("search", total=None)
    return find_chain(
        model,
        _cost(model, loaded),
        loaded.validation,
        recipe.search,
        lambda done, total: progress.update(task, completed=done, total=total),
    )


def _export(
    recipe: Recipe, model: nn.Module, loaded: Data, chain: Chain, path: Path, progress: Progress
) -> Path:
    cost = _cost(model, loaded)
    checking = progress.add_task("points", total=len(chain))
    points = make_points(
        model,
        cost,
        chain,
        loaded.train,
        loaded.validation,
        lambda done, _: progress.update(checking, completed=done),
    )
    extras = _for_hosts(recipe, model, cost, loaded, progress)
    task = progress.add_task("export", total=len(points))
    description = Description(
        name=recipe.name,
        task="image-classification",
        labels=recipe.labels or loaded.classes,
        scored_on=f"{recipe.data_set} {loaded.scoring}",
        provenance={
            **recipe.identity(loaded.sha256),
            "epochs": recipe.training.epochs,
            "data_set": f"{recipe.data_set}, {recipe.source}",
            "packages": {name: version(name) for name in ("torch", "onnx", "onnxruntime", "numpy")},
            "python": platform.python_version(),
        },
    )
    export_artifact(
        model,
        cost,
        points,
        loaded.test,
        description,
        path,
        lambda: progress.advance(task),
        extras,
    )
    return path


def _for_hosts(
    recipe: Recipe, model: nn.Module, cost: Cost, loaded: Data, progress: Progress
) -> dict[str, bytes]:
    """Return what a host needs to look for points of its own, of the network as it is served."""
    if not recipe.kept_samples:
        return {}
    task = progress.add_task("errors", total=None)
    tables = error_tables(
        model,
        cost,
        loaded.validation,
        recipe.search,
        lambda done, total: progress.update(task, completed=done, total=total),
    )
    x, labels = loaded.test.batch(slice(0, recipe.kept_samples))
    names = [layer.name for layer in cost.layers]
    return held_out.contents(x.cpu().numpy(), labels.cpu().numpy(), names, tables)


def _cost(model: nn.Module, loaded: Data) -> Cost:
    x, _ = loaded.validation.batch(slice(0, 1))
    return measure(model, x)


def _aimed(recipe: Recipe | TextRecipe, target: Target | None) -> Recipe | TextRecipe:
    """Return the recipe with that target, which alone then says how large the network is."""
    if target is None:
        return recipe
    return replace(
        recipe,
        training=replace(recipe.training, target=target),
        search=replace(recipe.search, most_macs=1.0),
    )


def _recipe(name: str) -> Recipe | TextRecipe:
    if name not in RECIPES:
        raise ValueError(f"no recipe '{name}'; there are: {', '.join(RECIPES)}")
    return RECIPES[name]


def _device(name: str) -> torch.device:
    """Return the device; of several processes each has a GPU of its own."""
    if name == "cpu":
        return data.CPU
    if name != "cuda":
        raise ValueError(f"device: cpu or cuda, not '{name}'")
    if not torch.cuda.is_available():
        raise ValueError("device: this PyTorch finds no CUDA GPU here; train with --device cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _load(recipe: Recipe, path: Path, progress: Progress) -> Data:
    if recipe.folders:
        task = progress.add_task("checking test pictures", total=None)
        return folders.load(
            path,
            recipe.image,
            recipe.folders,
            recipe.validation,
            recipe.training.seed,
            max(1, usable_cores() // distributed.size()),
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    return data.load(
        path,
        recipe.image,
        len(recipe.labels),
        recipe.validation,
        recipe.training.seed,
        recipe.augmentation,
    )


def _network(recipe: Recipe) -> nn.Module:
    torch.manual_seed(recipe.training.seed)
    return recipe.network()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=distributed.rank() > 0,
    )
