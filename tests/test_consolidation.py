"""The loss on a chain, against its definition."""

from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maestro_core.consolidation import consolidation_loss
from maestro_core.factorize import factorize_, forward_at

CHAIN = [(1, 1), (2, 3), (4, 6)]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6))
    factorize_(model)
    return model


@pytest.mark.parametrize(
    ("chain", "trained"),
    [(CHAIN, CHAIN[:2]), ([CHAIN[0], CHAIN[2]], CHAIN[:1]), (CHAIN[2:], [])],
)
def test_points_learn_the_answers_of_the_whole_network(
    chain: list[tuple[int, ...]], trained: list[tuple[int, ...]]
) -> None:
    model, x, labels = network(), torch.randn(5, 4), torch.randint(6, (5,))

    loss = consolidation_loss(model, chain, x, labels, Random(0))

    whole = model(x)
    expected = F.cross_entropy(whole, labels)
    for first, second in trained:
        answers = forward_at(model, {"0": first, "2": second}, x).log_softmax(1)
        expected = expected - (whole.softmax(1) * answers).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_the_whole_network_is_not_pulled_to_its_points() -> None:
    model, alone, x = network(), network(), torch.randn(5, 4)
    labels = torch.randint(6, (5,))

    torch.autograd.backward(consolidation_loss(model, [(1, 1), (4, 6)], x, labels, Random(0)))
    torch.autograd.backward(F.cross_entropy(alone(x), labels))

    ours, expected = (net.get_parameter("0.down").grad for net in (model, alone))
    assert ours is not None
    assert expected is not None
    # Only the whole network has the rows beyond the first, so the point's loss adds nothing there.
    torch.testing.assert_close(ours[1:], expected[1:])
    assert not torch.allclose(ours[0], expected[0])


def test_with_teachers_all_learn_their_mean_answer_and_no_label() -> None:
    model, x = network(), torch.randn(5, 4)
    teachers = [nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5)).eval() for _ in range(2)]

    loss, other = (
        consolidation_loss(model, CHAIN, x, labels, Random(0), teachers=teachers)
        for labels in (torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64))
    )

    answers = (teachers[0](x).softmax(1) + teachers[1](x).softmax(1)) / 2
    expected = torch.zeros(())
    for first, second in CHAIN:
        learnt = forward_at(model, {"0": first, "2": second}, x).log_softmax(1)
        expected = expected - (answers * learnt).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(loss, other)
    torch.autograd.backward(loss)
    assert all(p.grad is None for teacher in teachers for p in teacher.parameters())
