"""Run a recipe for text: train, search, score. Its points are a JSON file, not yet an artifact."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from maestro_core import distributed, sentences
from maestro_core.accounting import Cost, measure
from maestro_core.data import CPU
from maestro_core.factorize import low_rank_layers, outline
from maestro_core.frontier import Chain
from maestro_core.perplexity import TextPoint, score_points
from maestro_core.recipes.recipe import TextRecipe
from maestro_core.search import check_removable, find_chain
from maestro_core.sentences import TOKENS, Corpus, example
from maestro_core.training import train_
from maestro_core.writing import write_atomically


def run_text(
    recipe: TextRecipe,
    data_path: Path,
    out: Path,
    progress: Progress,
    device: torch.device = CPU,
) -> Path | None:
    """Train `recipe`, or go on where it stopped; return the file of its points, in `out`.

    The tokeniser lies beside it. Of several processes the first makes both, others return None.

    Raises:
        ValueError: wrong data, another run's checkpoint, or a disk that is full; each says which.
        Diverged: the loss is no longer finite.
        TargetMissed: the target can't be reached, or was not.
    """
    with progress:
        loaded = sentences.load(data_path, recipe.languages, recipe.splits, recipe.vocabulary)
        corpus = loaded.on(device)
        torch.manual_seed(recipe.training.seed)
        model = recipe.network()
        hollow = outline(model, recipe.training.keep)
        check_removable(recipe.search, low_rank_layers(hollow))
        measure(hollow, example(loaded.test))
        model.to(device)
        chain = train_(
            model,
            corpus,
            recipe.training,
            lambda: _find_chain(recipe, model, corpus, progress),
            out / f"{recipe.name}-checkpoints",
            recipe.identity(corpus.sha256),
            progress,
        )
        if distributed.rank() > 0:
            return None
        cost = measure(model, example(corpus.test))
        task = progress.add_task("points", total=len(chain))
        points = score_points(model, cost, chain, corpus, lambda: progress.advance(task))
    write_atomically(out / f"{recipe.name}-tokenizer.model", corpus.tokenizer)
    report = json.dumps(_report(recipe, cost, points, corpus), indent=1)
    path = out / f"{recipe.name}-points.json"
    write_atomically(path, report.encode())
    return path


def _find_chain(recipe: TextRecipe, model: nn.Module, corpus: Corpus, progress: Progress) -> Chain:
    task = progress.add_task("search", total=None)
    return find_chain(
        model,
        measure(model, example(corpus.test)),
        corpus.validation,
        recipe.search,
        lambda done, total: progress.update(task, completed=done, total=total),
    )


def _report(
    recipe: TextRecipe, cost: Cost, points: list[TextPoint], corpus: Corpus
) -> dict[str, Any]:
    labels = corpus.test.batch(slice(None))[1]
    return {
        "name": recipe.name,
        "metric": "perplexity of a token, 95 % interval over test sentences",
        "test": {
            "split": recipe.splits[2],
            "sentences": len(corpus.test),
            "tokens": int((labels >= 0).sum()),
        },
        "tokens_of_macs": TOKENS,
        "dense": {
            "macs": cost.dense_macs,
            "params": cost.dense_params,
            "embedding_params": cost.dense_embedding_params,
            "linear_params": cost.dense_params - cost.dense_embedding_params,
        },
        "layers": [layer.name for layer in cost.layers],
        "points": [point._asdict() for point in points],
        "provenance": {
            **recipe.identity(corpus.sha256),
            "epochs": recipe.training.epochs,
            "data_set": f"{recipe.data_set}, {recipe.source}",
            "packages": {name: version(name) for name in ("torch", "sentencepiece", "numpy")},
            "python": platform.python_version(),
        },
    }
