"""Nested phases of one group begin from one network; the mean of their ends is the group's.

Of weights that were trained apart from the same start, the mean answers better than each, at the
cost of one (Wortsman et al., "Model soups", ICML 2022). A group after another begins from a mean,
which then counts as one of its ends.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from maestro_core import checkpoint, distributed
from maestro_core.data import Data
from maestro_core.normalisation import CALIBRATING, recalibrate
from maestro_core.schedule import HyperParameters
from maestro_core.sentences import Corpus


def begin_(model: nn.Module, root: Path, hyper: HyperParameters, epochs: int) -> None:
    """Make `model` what the group's phases begin from, where one begins after so many epochs.

    Raises:
        CheckpointError: that is missing or damaged, or the disk does not take it.
    """
    group = hyper.at(epochs)[0].group
    if not group:
        return
    first, _ = hyper.group(group)
    if epochs > first:
        checkpoint.load_weights_(root, _start(first), model)
    else:
        distributed.by_first(lambda: checkpoint.save_weights(root, _start(first), model))


def end_(
    model: nn.Module, data: Data | Corpus, root: Path, hyper: HyperParameters, epochs: int
) -> None:
    """Keep what a phase of a group ended with, if one did; after the last, make `model` the mean.

    Its normalisation is set by training pictures: a mean of statistics is not the mean's.

    Raises:
        CheckpointError: what an earlier phase ended with is missing or damaged, or the disk does
            not take this one's.
    """
    group = hyper.at(epochs - 1)[0].group
    first, ends = hyper.group(group) if group else (0, [])
    if epochs not in ends:
        return
    distributed.by_first(lambda: checkpoint.save_weights(root, _end(epochs), model))
    if epochs < ends[-1]:
        return
    other = copy.deepcopy(model)
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    names = [_end(end) for end in ends[:-1]]
    if first and hyper.at(first - 1)[0].group:
        names.append(_start(first))
    with torch.no_grad():
        for number, name in enumerate(names, 2):
            checkpoint.load_weights_(root, name, other)
            for parameter, others in pairs:
                parameter.lerp_(others, 1 / number)
    if isinstance(data, Data):
        statistics = recalibrate(model, {}, data.train.first(CALIBRATING))
        model.load_state_dict(statistics, strict=False)


def _start(epochs: int) -> str:
    return f"start-{epochs:04}"


def _end(epochs: int) -> str:
    return f"nested-{epochs:04}"
