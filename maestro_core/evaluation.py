"""Loss, accuracy and perplexity of a network at given ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, inf
from types import MappingProxyType

import torch
from torch import Tensor, nn

from maestro_core.factorize import forward_at
from maestro_core.loss import IGNORED, cross_entropy
from maestro_core.normalisation import evaluating, scratch
from maestro_core.sentences import Samples, Sentences

BATCH = 500  # LeNet, two cores: 500 is 10 % faster than 128 or 2,000
PAIRS = 50  # of sentences: every token has a logit for each of the vocabulary


@dataclass(frozen=True, slots=True)
class Result:
    """The mean cross-entropy and how many of `n` pictures, or tokens of sentences, were right."""

    loss: float
    correct: int
    n: int

    @property
    def accuracy(self) -> float:
        """Return the share of right answers, 0..1."""
        return self.correct / self.n

    @property
    def perplexity(self) -> float:
        """Return exp(loss): among how many tokens the network is as good as undecided."""
        return exp(self.loss) if self.loss < 700 else inf  # exp overflows just above


def evaluate(
    model: nn.Module,
    samples: Samples,
    ranks: Mapping[str, int] = MappingProxyType({}),
    statistics: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    by_batch: bool = False,
) -> Result:
    """Return how `model`, cut to `ranks`, does on all `samples`; its mode is put back.

    It is normalised by `statistics`, those of the model where there are none, or by each batch.
    """
    loss, correct, n = 0.0, 0, 0
    size = PAIRS if isinstance(samples, Sentences) else BATCH
    with evaluating(model, by_batch), torch.inference_mode():
        for x, labels in samples.batches(size):
            buffers = scratch(model) if by_batch else statistics
            logits = forward_at(model, ranks, x, buffers=buffers)
            loss += cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(-1) == labels).sum())
            n += int((labels != IGNORED).sum())
    return Result(loss / n, correct, n)
