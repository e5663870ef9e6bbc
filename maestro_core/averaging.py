"""Nested phases that begin from one network; the mean of what they end with is the run's network.

Of weights that were trained apart from the same start, the mean answers better than each, at the
cost of one (Wortsman et al., "Model soups", ICML 2022).
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
    """Make `model` what every nested phase begins from, if one begins after so many epochs.

    Raises:
        CheckpointError: that is missing or damaged, or the disk does not take it.
    """
    first = sum(phase.epochs for phase in hyper.phases if phase.kind != "nested")
    if epochs > first:
        checkpoint.load_weights_(root, _name(first), model)
    elif epochs == first and distributed.rank() == 0:
        checkpoint.save_weights(root, _name(first), model)


def end_(
    model: nn.Module, data: Data | Corpus, root: Path, hyper: HyperParameters, epochs: int
) -> None:
    """Keep what a nested phase ended with, if one did; after the last, make `model` the mean.

    Its normalisation is set by training pictures: a mean of statistics is not the mean's.

    Raises:
        CheckpointError: what an earlier phase ended with is missing or damaged, or the disk does
            not take this one's.
    """
    ends = hyper.ends("nested")
    if epochs not in ends:
        return
    if distributed.rank() == 0:
        checkpoint.save_weights(root, _name(epochs), model)
    if epochs < ends[-1]:
        return
    other = copy.deepcopy(model)
    parameters = list(zip(model.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        for number, end in enumerate(ends[:-1], 2):
            checkpoint.load_weights_(root, _name(end), other)
            for parameter, others in parameters:
                parameter.lerp_(others, 1 / number)
    if isinstance(data, Data):
        statistics = recalibrate(model, {}, data.train.first(CALIBRATING))
        model.load_state_dict(statistics, strict=False)


def _name(epochs: int) -> str:
    return f"nested-{epochs:04}"
