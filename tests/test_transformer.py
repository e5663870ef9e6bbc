"""The transformer: what a place may see, and that cutting it is a product of matrices."""

import pytest
import torch
from torch import Tensor

from maestro_core.factorize import factorize_, forward_at, low_rank_layers
from maestro_core.models.transformer import Transformer, positions

PAD = 0


def network(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(30, width=16, layers=2, heads=4, hidden=24).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(4, 30, shape, generator=torch.Generator().manual_seed(len(shape)))


@torch.no_grad()
def test_a_later_target_token_changes_no_earlier_logit() -> None:
    model, source, target = network(), tokens(3, 6), tokens(3, 7)
    before = model((source, target))

    for place in range(1, 7):
        changed = target.clone()
        changed[:, place] = (changed[:, place] - 3) % 26 + 4
        after = model((source, changed))
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=1e-6)
        assert (after[:, place] - before[:, place]).abs().max() > 1e-3


@torch.no_grad()
def test_padding_changes_no_logit_of_a_token() -> None:
    model, source, target = network(), tokens(1, 6), tokens(1, 7)
    before = model((source, target))

    longer = [torch.cat([x, x.new_full((1, 3), PAD)], 1) for x in (source, target)]
    batch = [torch.cat([x, torch.randint(4, 30, x.shape)]) for x in longer]
    after = model((batch[0], batch[1]))

    torch.testing.assert_close(after[:1, :7], before, rtol=0, atol=1e-5)
    model.embedding.weight[PAD] += 5
    again = model((batch[0], batch[1]))
    torch.testing.assert_close(again[:1, :7, 1:], after[:1, :7, 1:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_source_token_counts() -> None:
    model, source, target = network(), tokens(1, 6), tokens(1, 3)
    before = model((source, target))

    for place in range(6):
        changed = source.clone()
        changed[:, place] = (changed[:, place] - 3) % 26 + 4
        assert (model((changed, target)) - before).abs().amin(1).max() > 1e-4


def test_factors_at_full_rank_are_the_dense_network() -> None:
    model, pair = network(), (tokens(3, 6), tokens(3, 7))
    before = model(pair)

    done = factorize_(model)

    assert not done.dense
    assert len(low_rank_layers(model)) == 2 * 6 + 2 * 10 + 1
    torch.testing.assert_close(model(pair), before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cut_network_is_the_dense_one_with_the_products_of_its_factors() -> None:
    model, dense, pair = network(), network(1), (tokens(3, 6), tokens(3, 7))
    factorize_(model)
    ranks = {name: 1 + i % 9 for i, name in enumerate(low_rank_layers(model))}
    state = dense.state_dict()
    for name, layer in low_rank_layers(model).items():
        up, down = layer.up[: ranks[name]], layer.down[: ranks[name]]
        state[f"{name}.weight"] = down.t() @ up if name == "embedding" else up.t() @ down
    state["head.weight"] = state["embedding.weight"]
    own = model.state_dict()
    state |= {name: own[name] for name in state if name in own}
    dense.load_state_dict(state)

    torch.testing.assert_close(forward_at(model, ranks, pair), dense(pair), rtol=0, atol=1e-5)


def test_the_table_is_one_parameter() -> None:
    model = network()

    assert model.head.weight is model.embedding.weight


def test_positions_are_the_published_ones() -> None:
    table = positions(20, 8)

    assert table.shape == (20, 8)
    for place, i in ((0, 0), (3, 1), (19, 3)):
        angle = torch.tensor(place / 10_000 ** (2 * i / 8))
        torch.testing.assert_close(table[place, 2 * i], angle.sin())
        torch.testing.assert_close(table[place, 2 * i + 1], angle.cos())


@pytest.mark.parametrize("length", [1, 300])
def test_sentences_of_any_length_are_taken(length: int) -> None:
    logits = network()((tokens(1, length), tokens(1, length)))

    assert logits.shape == (1, length, 30)
    assert logits.isfinite().all()
