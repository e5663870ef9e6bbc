"""Perplexity of points on held-out sentences: exp of the mean cross-entropy of a token.

Validation sentences choose the points, test sentences only score them. A perplexity is that of one
vocabulary: with other tokens the same network of the same quality has another.
"""

from collections.abc import Callable, Mapping
from math import exp, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestro_core.accounting import Cost
from maestro_core.artifact import Z_95, Score
from maestro_core.evaluation import PAIRS, evaluate
from maestro_core.factorize import forward_at
from maestro_core.frontier import Chain, pareto
from maestro_core.loss import IGNORED
from maestro_core.normalisation import evaluating
from maestro_core.search import by_name
from maestro_core.sentences import TOKENS, Corpus, Sentences


class TextPoint(NamedTuple):
    """A point with what it costs, and its perplexity with the 95 % interval over test sentences.

    `macs` are those of a pair of 28 tokens each, `macs_per_token` a 28th of it. `linear_params` are
    all that are not in an embedding or a projection tied to it.
    """

    ranks: tuple[int, ...]
    macs: int
    macs_per_token: int
    params: int
    embedding_params: int
    linear_params: int
    validation: float
    perplexity: float
    low: float
    high: float


def score_points(
    model: nn.Module, cost: Cost, chain: Chain, corpus: Corpus, on_point: Callable[[], None]
) -> list[TextPoint]:
    """Return the points of `chain` that do better on validation sentences than all cheaper ones."""
    losses = []
    for ranks in chain:
        losses.append(evaluate(model, corpus.validation, by_name(cost, ranks)))
        on_point()
    macs = [cost.macs_at(ranks) for ranks in chain]
    points = []
    for i in pareto(macs, [-result.loss for result in losses]):
        ranks = chain[i]
        score = perplexity(*sentence_losses(model, corpus.test, by_name(cost, ranks)))
        params, embedding = cost.params_at(ranks), cost.embedding_params_at(ranks)
        points.append(
            TextPoint(
                ranks=ranks,
                macs=macs[i],
                macs_per_token=round(macs[i] / TOKENS),
                params=params,
                embedding_params=embedding,
                linear_params=params - embedding,
                validation=losses[i].perplexity,
                perplexity=score.value,
                low=score.low,
                high=score.high,
            )
        )
    return points


def sentence_losses(
    model: nn.Module, sentences: Sentences, ranks: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over each sentence's tokens, (n,), and their number, (n,)."""
    losses, counts = [], []
    with evaluating(model), torch.inference_mode():
        for x, labels in sentences.batches(PAIRS):
            logits = forward_at(model, ranks, x).transpose(1, 2)  # (b, vocabulary, t)
            losses.append(F.cross_entropy(logits, labels, reduction="none").sum(1))
            counts.append((labels != IGNORED).sum(1))
    return torch.cat(losses).double(), torch.cat(counts).double()


def perplexity(losses: Tensor, counts: Tensor) -> Score:
    """Return the perplexity of a token and its 95 % interval, from the sums of n >= 2 sentences.

    Tokens of a sentence are alike, so that sentences are what was drawn: the interval is that of a
    ratio of sums over them (Cochran, Sampling Techniques, 1977, §6), and says nothing of other
    seeds.
    """
    n, tokens = len(losses), float(counts.sum())
    mean = float(losses.sum()) / tokens
    residuals = losses - mean * counts
    half = Z_95 * sqrt(n / (n - 1) * float(residuals.square().sum())) / tokens
    return Score(exp(mean), exp(mean - half), exp(mean + half))
