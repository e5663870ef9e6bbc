"""Perplexity of points: by its definition, with an interval that a bootstrap finds too."""

import math

import pytest
import torch

from maestro_core.accounting import measure
from maestro_core.evaluation import evaluate
from maestro_core.factorize import factorize_, forward_at, low_rank_layers
from maestro_core.loss import IGNORED, cross_entropy, distillation_loss
from maestro_core.models.transformer import Transformer
from maestro_core.perplexity import perplexity, score_points, sentence_losses
from maestro_core.search import by_name
from maestro_core.sentences import BEGIN, END, PAD, Corpus, Sentences, example


def sentences(n: int, seed: int) -> Sentences:
    generator = torch.Generator().manual_seed(seed)

    def side() -> torch.Tensor:
        table = torch.randint(4, 20, (n, 9), generator=generator)
        lengths = torch.randint(3, 9, (n,), generator=generator)
        table[torch.arange(9) >= lengths[:, None]] = PAD
        table[torch.arange(n), lengths - 1] = END
        return table

    source, target = side(), side()
    target[:, 0] = BEGIN
    return Sentences(source, target)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(sentences(9, 0), sentences(120, 1), sentences(130, 2), b"", "noise", "0")


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    network = Transformer(20, width=12, layers=1, heads=2, hidden=16).eval()
    factorize_(network)
    return network


def test_a_perplexity_is_over_tokens_and_not_over_padding(
    model: Transformer, corpus: Corpus
) -> None:
    logs = []
    for i in range(len(corpus.test)):
        x, labels = corpus.test.batch(slice(i, i + 1))
        with torch.no_grad():
            shares = forward_at(model, {"embedding": 5}, x).softmax(-1)
        logs += [-math.log(row[label]) for row, label in zip(shares[0], labels[0], strict=True)]

    score = perplexity(*sentence_losses(model, corpus.test, {"embedding": 5}))
    result = evaluate(model, corpus.test, {"embedding": 5})

    assert result.n == len(logs)
    assert score.value == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-5)
    assert result.perplexity == pytest.approx(score.value, rel=1e-5)


def test_the_interval_is_that_of_a_bootstrap_over_sentences() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(4, 30, (400,), generator=generator).double()
    hard = torch.rand(400, generator=generator).double() + 1  # alike within a sentence
    losses = counts * hard

    score = perplexity(losses, counts)

    drawn = torch.randint(400, (4_000, 400), generator=generator)
    values = (losses[drawn].sum(1) / counts[drawn].sum(1)).exp()
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975]).double()).tolist()
    assert score.low < score.value < score.high
    assert (score.low, score.high) == pytest.approx((low, high), rel=0.01)


def test_points_are_chosen_by_validation_and_scored_by_test(
    model: Transformer, corpus: Corpus
) -> None:
    cost = measure(model, example(corpus.test))
    whole = tuple(layer.max_rank for layer in cost.layers)
    chain = [tuple(min(rank, r) for r in whole) for rank in (1, 2, 4)] + [whole]

    points = score_points(model, cost, chain, corpus, lambda: None)

    losses = {r: evaluate(model, corpus.validation, by_name(cost, r)).perplexity for r in chain}
    assert points
    for point in points:
        cheaper = [losses[r] for r in chain if cost.macs_at(r) < point.macs]
        assert all(point.validation < loss for loss in cheaper)
        assert point.validation == losses[point.ranks]
        assert point.low < point.perplexity < point.high
        assert point.params == point.embedding_params + point.linear_params
        assert point.macs_per_token == round(point.macs / 28)
    assert list(low_rank_layers(model)) == [layer.name for layer in cost.layers]


def test_places_without_a_label_do_not_count_in_a_loss() -> None:
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[1, 2, IGNORED], [5, IGNORED, IGNORED]])
    rows, said = logits[labels != IGNORED], torch.tensor([1, 2, 5])

    for smoothing in (0.0, 0.1):
        expected = torch.nn.functional.cross_entropy(rows, said, label_smoothing=smoothing)
        torch.testing.assert_close(cross_entropy(logits, labels, smoothing), expected)


def test_places_without_a_label_teach_nothing() -> None:
    labels = torch.tensor([[1, 2, IGNORED], [5, IGNORED, IGNORED]])
    logits, answers = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7).softmax(-1)
    rows = labels != IGNORED
    expected = torch.nn.functional.cross_entropy(logits[rows], answers[rows])

    loss = distillation_loss(logits, answers, labels)

    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_loss_needs_no_value_before_it_is_on_its_way() -> None:
    """A tensor without values stands for one that a GPU is still at."""
    logits, labels = torch.empty(2, 3, 7, device="meta"), torch.zeros(2, 3, device="meta")

    for loss in (
        distillation_loss(logits, logits.softmax(-1), labels),
        cross_entropy(logits, labels.long()),
    ):
        assert loss.shape == ()
