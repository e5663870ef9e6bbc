"""Whole networks: factorised in place, and run at given ranks."""

import pytest
import torch
from torch import Tensor, nn

from maestro_core.factorize import factorize_, forward_at, low_rank_layers, outline
from maestro_core.layers import LowRankConv2d, LowRankEmbedding, LowRankLinear
from maestro_core.lod import truncate_


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.fc1 = nn.Linear(6 * 36, 12)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.conv(x)).relu()).relu()
        logits: Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
        return logits


class Shared(nn.Module):
    """One module under two names, and two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.tied = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)
        self.head.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tied(self.again(self.first(x).relu())))
        return logits


class Language(nn.Module):
    """A table that two embeddings and the projection share, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(40, 12)
        self.target = nn.Embedding(40, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 40)
        nn.init.normal_(self.source.weight, std=0.3)
        self.target.weight = self.source.weight
        self.head.weight = self.source.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x, y = self.source(tokens), self.target(tokens.flip(1))
        logits: Tensor = self.head(self.attention(y, x, x)[0])
        return logits


def test_factorising_leaves_the_forward_pass_unchanged() -> None:
    model, x = Net().eval(), torch.randn(4, 2, 8, 8)
    before = model(x)

    done = factorize_(model)

    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    assert done.low_rank == ("conv", "fc1", "fc2")
    assert list(low_rank_layers(model)) == ["conv", "fc1", "fc2"]


def test_a_grouped_convolution_is_left_dense_and_said_so() -> None:
    model = Net()

    done = factorize_(model)

    assert isinstance(model.depthwise, nn.Conv2d)
    assert done.dense == {"depthwise": "groups=6: only 1 is factorised"}


def test_padding_that_is_not_zeros_is_left_dense_and_said_so() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"))

    assert "circular" in factorize_(model).dense["0"]


@pytest.mark.parametrize(
    ("keep", "low_rank"), [(["fc2"], ("conv", "fc1")), (["fc?"], ("conv",)), (["conv"], None)]
)
def test_only_the_layers_named_in_keep_stay_dense(
    keep: list[str], low_rank: tuple[str, ...] | None
) -> None:
    model = Net()

    done = factorize_(model, keep)

    assert done.low_rank == (low_rank or ("fc1", "fc2"))
    assert set(done.dense) == {"conv", "depthwise", "fc1", "fc2"} - set(done.low_rank)


def test_a_pattern_that_matches_nothing_is_refused_before_anything_changes() -> None:
    model = Net()

    with pytest.raises(ValueError, match="'fc9' matches no"):
        factorize_(model, ["fc1", "fc9"])
    assert not low_rank_layers(model)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = Net()
    model.fc1.weight.data[0, 0] = torch.inf

    with pytest.raises(ValueError, match="layer 'fc1' holds values that are not finite"):
        factorize_(model)
    assert not low_rank_layers(model)


def test_a_shared_module_stays_shared_and_a_tied_weight_stays_tied() -> None:
    model, x = Shared(), torch.randn(3, 8)
    before = model(x)

    done = factorize_(model)

    assert done.low_rank == ("first",)
    assert model.again is model.first
    assert model.head.weight is model.tied.weight
    assert set(done.dense) == {"tied", "head"}
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)


def test_a_shared_module_is_cut_at_every_use() -> None:
    model, x = Shared(), torch.randn(3, 8)
    factorize_(model)
    (layer,) = low_rank_layers(model).values()

    y = forward_at(model, {"first": 3}, x)

    expected = model.head(model.tied(layer(layer(x, 3).relu(), 3)))
    torch.testing.assert_close(y, expected)


def test_a_shared_module_is_whole_again_after_a_call() -> None:
    model, x = Shared(), torch.randn(3, 8)
    factorize_(model)
    before = dict(model.named_parameters(remove_duplicate=False))

    forward_at(model, {"first": 3}, x)

    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_a_shared_module_has_its_own_buffers_again_after_a_call() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8))
    model.add_module("2", model[0])
    own = model.get_buffer("0.running_mean")

    forward_at(model.eval(), {}, torch.randn(3, 8), buffers={"0.running_mean": torch.ones(8)})

    assert model.get_buffer("0.running_mean") is own
    assert model.get_buffer("2.running_mean") is own


def test_a_layer_whose_forward_was_replaced_stays_dense() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(3, 8)
    whole = model[0].forward
    model[0].forward = lambda x: whole(x.abs())
    before = model(x)

    done = factorize_(model)

    assert done.dense == {"0": "its forward is not its class's"}
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)


def test_attention_that_reads_its_children_still_runs() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    before = model(x)

    done = factorize_(model)

    assert done.low_rank == ()
    assert set(done.dense) == {"self_attn", "linear1", "linear2"}
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)


def test_a_table_and_its_projection_share_their_factors_and_count_once() -> None:
    model, tokens = Language(), torch.randint(40, (3, 7))
    before = model(tokens)

    done = factorize_(model)

    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-5)
    maps = ("query", "key", "value", "output")
    assert done.low_rank == ("source", "target", *(f"attention.{m}" for m in maps), "head")
    assert list(low_rank_layers(model)) == ["source", *(f"attention.{m}" for m in maps)]
    source, head = model.get_submodule("source"), model.get_submodule("head")
    assert isinstance(source, LowRankEmbedding)
    assert isinstance(head, LowRankLinear)
    assert head.up is source.down
    assert head.down is source.up
    tables = sum(p.numel() for p in (source.down, source.up))
    assert sum(p.numel() for p in model.parameters()) == tables + 4 * 2 * 144 + 48 + 40


@pytest.mark.parametrize("rank", [0, 5, 12])
def test_a_table_and_its_projection_are_cut_together(rank: int) -> None:
    model, tokens = Language(), torch.randint(40, (3, 7))
    factorize_(model)
    source = low_rank_layers(model)["source"]
    table = source.down[:rank].t() @ source.up[:rank]

    cut = forward_at(model, {"source": rank}, tokens)

    y = model.attention(table[tokens.flip(1)], table[tokens], table[tokens])[0]
    torch.testing.assert_close(cut, y @ table.t() + model.head.bias, rtol=0, atol=1e-5)
    truncate_(source, rank)
    assert [layer.rank for layer in (model.source, model.target, model.head)] == [rank] * 3
    torch.testing.assert_close(model(tokens), cut)


def test_a_table_that_is_kept_keeps_its_projection() -> None:
    model, tokens = Language(), torch.randint(40, (3, 7))
    before = model(tokens)

    done = factorize_(model, keep=["source"])

    assert set(done.dense) == {"source", "target", "head"}
    assert model.head.weight is model.source.weight
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-5)


def test_attention_that_is_kept_stays_one_module() -> None:
    model = Language()

    done = factorize_(model, keep=["attention"])

    assert isinstance(model.attention, nn.MultiheadAttention)
    assert done.dense == {"attention": "kept"}


def test_attention_of_a_decoder_layer_of_torch_is_factorised() -> None:
    model = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval()
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    before = model(x, memory)

    done = factorize_(model)

    assert not done.dense
    assert len(low_rank_layers(model)) == 10
    torch.testing.assert_close(model(x, memory), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("network", "keep"), [(Net, ["fc1"]), (Shared, []), (Language, [])])
def test_an_outline_has_the_shapes_of_the_factorised_network(
    network: type[nn.Module], keep: list[str]
) -> None:
    model = network()
    generator = torch.get_rng_state()

    found = outline(model, keep)

    assert torch.equal(torch.get_rng_state(), generator)
    assert not low_rank_layers(model)
    factorize_(model, keep)
    expected = {name: value.shape for name, value in model.named_parameters()}
    assert {name: value.shape for name, value in found.named_parameters()} == expected
    assert list(low_rank_layers(found)) == list(low_rank_layers(model))


def test_forward_at_equals_the_layers_called_with_ranks() -> None:
    model, x = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 7)), torch.randn(4, 9)
    factorize_(model)
    first, second = low_rank_layers(model).values()

    y = forward_at(model, {"0": 3, "2": 5}, x)

    torch.testing.assert_close(y, second(first(x, 3).relu(), 5))


def test_forward_at_sends_gradients_to_the_model_and_changes_nothing() -> None:
    model, x = Net(), torch.randn(4, 2, 8, 8)
    factorize_(model)
    names = [name for name, _ in model.named_parameters()]
    model.eval()
    before = model(x)

    loss = forward_at(model, {"fc1": 2}, x).square().sum()
    torch.autograd.backward(loss)

    down = model.get_parameter("fc1.down").grad
    assert down is not None
    assert down[:2].abs().max() > 0
    assert down[2:].abs().max() == 0
    assert model.get_parameter("conv.down").grad is not None
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(x), before)


def test_forward_at_cuts_by_views_of_the_same_memory() -> None:
    model = nn.Sequential(nn.Linear(9, 8))
    factorize_(model)
    seen = []
    layer = low_rank_layers(model)["0"]
    layer.register_forward_hook(lambda layer, *_: seen.append(layer.down))

    forward_at(model, {"0": 3}, torch.randn(1, 9))

    assert seen[0].shape == (3, 9)
    assert seen[0].data_ptr() == layer.down.data_ptr()


def test_a_forward_pass_that_fails_leaves_the_model_whole() -> None:
    model = Net()
    factorize_(model)

    with pytest.raises(RuntimeError):
        forward_at(model, {"conv": 1, "fc1": 2}, torch.randn(1, 2, 5, 5))

    assert low_rank_layers(model)["fc1"].rank == 12
    assert low_rank_layers(model)["conv"].rank == 6


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"fc1": 13}, r"layer 'fc1' has ranks 0\.\.12, not 13"),
        ({"fc1": -1}, r"layer 'fc1' has ranks 0\.\.12, not -1"),
        ({"fc9": 1}, r"'fc9' is not a factorised layer; they are: conv, fc1, fc2"),
        ({"norm": 1}, r"'norm' is not a factorised layer"),
    ],
)
def test_a_wrong_layer_or_rank_is_refused(ranks: dict[str, int], message: str) -> None:
    model = Net()
    factorize_(model)

    with pytest.raises(ValueError, match=message):
        forward_at(model, ranks, torch.randn(1, 2, 8, 8))


def test_factors_keep_type_and_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 3, 3)).double()
    model[0].weight.requires_grad_(False)

    factorize_(model)

    assert isinstance(model[0], LowRankLinear)
    assert isinstance(model[1], LowRankConv2d)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not model[0].down.requires_grad
    assert not model[0].up.requires_grad
    assert model[1].down.requires_grad
