"""Train the points of a chain together, after low-rank ordered training found their order.

Not in the Maestro paper, where a network is cut one layer at a time. A point cuts all of them; it
learns here to answer as the whole network does (the sandwich rule and in-place distillation of Yu
and Huang, "Universally Slimmable Networks", ICCV 2019, on ranks that are nested).
"""

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor, nn

from maestro_core.data import Inputs
from maestro_core.factorize import forward_at, low_rank_layers
from maestro_core.loss import cross_entropy, distillation_loss
from maestro_core.normalisation import scratch
from maestro_core.teachers import taught_answers


def consolidation_loss(
    model: nn.Module,
    chain: Sequence[Sequence[int]],
    x: Inputs,
    labels: Tensor,
    rng: Random,
    label_smoothing: float = 0.0,
    teachers: Sequence[nn.Module] = (),
) -> Tensor:
    """Return the sum of the whole network's loss on `labels` and two points' on its answers.

    With `teachers` (teachers.py) all three learn their answers instead. The points are the cheapest
    and one drawn from between; a chain of one or two has fewer. They are normalised by the batch
    and leave the model's statistics to the whole network.
    """
    names = list(low_rank_layers(model))
    whole: Tensor = model(x)
    if teachers:
        answers = taught_answers(teachers, x)
        first = distillation_loss(whole, answers, labels)
    else:
        answers = whole.detach().float().softmax(-1)
        first = cross_entropy(whole, labels, label_smoothing)
    between = [rng.choice(chain[1:-1])] if len(chain) > 2 else []
    points = [
        forward_at(model, dict(zip(names, ranks, strict=True)), x, buffers=scratch(model))
        for ranks in (*chain[:-1][:1], *between)
    ]
    losses = [first, *(distillation_loss(y, answers, labels) for y in points)]
    return torch.stack(losses).sum()
