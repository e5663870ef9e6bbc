"""The dense networks that a run's dense phases ended with: together they teach its points.

The mean answer of networks from different cycles of the learning rate is better than that of the
last alone (Huang et al., "Snapshot Ensembles", ICLR 2017), and a smaller network learns it (Hinton
et al., 2015) best on pictures changed alike for both (Beyer et al., "Knowledge distillation: A good
teacher is patient and consistent", CVPR 2022).
"""

import copy
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from maestro_core import checkpoint
from maestro_core.data import Inputs
from maestro_core.schedule import HyperParameters, Phase


def ends_with_teacher(hyper: HyperParameters, epoch: int) -> bool:
    """Return whether the network after `epoch`, from 0, is to be kept as a teacher."""
    return hyper.taught and epoch + 1 in _last_epochs(hyper.phases)


def load_teachers(root: Path, dense: nn.Module, hyper: HyperParameters) -> list[nn.Module]:
    """Return the teachers that were kept in `root`, like `dense`, in inference mode.

    Raises:
        CheckpointError: one is missing, damaged or of another network.
    """
    if not hyper.taught:
        return []
    teachers = []
    for epoch in _last_epochs(hyper.phases):
        teacher = copy.deepcopy(dense).eval().requires_grad_(False)
        checkpoint.load_weights_(root, epoch, teacher)
        teachers.append(teacher)
    return teachers


def taught_answers(teachers: Sequence[nn.Module], x: Inputs) -> Tensor:
    """Return the teachers' mean answer to x (b, …): probabilities (b, …, classes), float32."""
    with torch.no_grad():
        return torch.stack([teacher(x).float().softmax(-1) for teacher in teachers]).mean(0)


def _last_epochs(phases: Sequence[Phase]) -> list[int]:
    """Return how many epochs are over at the end of each dense phase."""
    ends = accumulate(phase.epochs for phase in phases)
    return [end for phase, end in zip(phases, ends, strict=True) if phase.kind == "dense"]
