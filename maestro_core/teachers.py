"""The dense networks that a run's dense phases ended with: together they teach its points.

The mean answer of networks from different cycles of the learning rate is better than that of the
last alone (Huang et al., "Snapshot Ensembles", ICLR 2017), and a smaller network learns it (Hinton
et al., 2015) best on pictures changed alike for both (Beyer et al., "Knowledge distillation: A good
teacher is patient and consistent", CVPR 2022).
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from maestro_core import checkpoint
from maestro_core.data import Inputs
from maestro_core.schedule import HyperParameters


def keep_teacher(root: Path, model: nn.Module, hyper: HyperParameters, epochs: int) -> None:
    """Keep `model` in `root` if after so many epochs it is to be a teacher.

    Raises:
        CheckpointError: the disk does not take it.
    """
    if hyper.taught and epochs in hyper.ends("dense"):
        checkpoint.save_weights(root, _name(epochs), model)


def load_teachers(root: Path, dense: nn.Module, hyper: HyperParameters) -> list[nn.Module]:
    """Return the teachers that were kept in `root`, like `dense`, in inference mode.

    Raises:
        CheckpointError: one is missing, damaged or of another network.
    """
    teachers = []
    for epochs in hyper.ends("dense"):
        teacher = copy.deepcopy(dense).eval().requires_grad_(False)
        checkpoint.load_weights_(root, _name(epochs), teacher)
        teachers.append(teacher)
    return teachers


def taught_answers(teachers: Sequence[nn.Module], x: Inputs) -> Tensor:
    """Return the teachers' mean answer to x (b, …): probabilities (b, …, classes), float32."""
    with torch.no_grad():
        return torch.stack([teacher(x).float().softmax(-1) for teacher in teachers]).mean(0)


def _name(epochs: int) -> str:
    return f"dense-{epochs:04}"
