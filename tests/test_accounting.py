"""MACs and parameters, against the figures that were published for the same ranks."""

import pytest
import torch
from torch import Tensor, nn

from maestro_core.accounting import Cost, measure
from maestro_core.factorize import factorize_
from maestro_core.models import resnet9
from maestro_core.models.lenet import LeNet
from maestro_core.models.resnet import ResNet18, ResNet50
from maestro_core.models.resnet9 import ResNet9
from maestro_core.models.transformer import Transformer
from maestro_core.models.vgg import VGG19
from maestro_core.recipes import imagenet_resnet50_partial

# Ranks of stem, then conv1, conv2, [shortcut] of each block, then the head: (name, ranks,
# million parameters, GMACs). Read off the rank plot of the Maestro poster (ICML 2024), ±1.
PUBLISHED = [
    (
        "8e-6",
        "27 64 64 64 64 127 128 64 128 128 209 238 122 243 218 263 268 184 259 209 10",
        7.39,
        0.49,
    ),
    (
        "16e-6",
        "27 62 64 63 63 87 101 55 101 96 122 144 84 152 125 133 128 100 122 87 10",
        4.073,
        0.385,
    ),
    (
        "32e-6",
        "24 42 44 44 40 52 62 36 64 57 70 80 49 85 67 69 64 51 59 39 10",
        2.177,
        0.247,
    ),
    (
        "64e-6",
        "17 26 26 28 25 32 39 23 37 35 43 50 29 50 36 39 34 26 31 19 10",
        1.232,
        0.149,
    ),
    ("1024e-6", "7 6 6 7 6 8 9 8 8 7 10 12 7 9 7 10 8 6 4 4 9", 0.27, 0.034),
]


@pytest.fixture(scope="module")
def resnet() -> Cost:
    with torch.device("meta"):
        dense = ResNet18()
    model = dense.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    factorize_(model)
    return measure(model, torch.zeros(1, 3, 32, 32))


def digits(text: str) -> int:
    return len(text.partition(".")[2])


@pytest.mark.parametrize(("name", "ranks", "params", "gmacs"), PUBLISHED)
def test_published_resnet18_ranks_cost_what_was_published(
    resnet: Cost, name: str, ranks: str, params: float, gmacs: float
) -> None:
    at = [int(rank) for rank in ranks.split()]
    # The plot lists each block's shortcut after its convolutions, as the modules do.
    assert round(resnet.params_at(at) / 1e6, digits(str(params))) == params, name
    assert round(resnet.macs_at(at) / 1e9, digits(str(gmacs))) == gmacs, name


def test_the_dense_resnet18_is_that_of_the_paper(resnet: Cost) -> None:
    full = [layer.max_rank for layer in resnet.layers]

    assert sum(full) == 4_325
    assert round(resnet.dense_params / 1e6, 2) == 11.17
    assert round(resnet.dense_macs / 1e9, 3) == 0.555
    # At full rank each layer is cheaper dense, so the point costs what the dense network does.
    assert resnet.macs_at(full) == resnet.dense_macs


def test_the_dense_vgg19_is_that_of_the_paper() -> None:
    model = VGG19()
    parameters = sum(p.numel() for p in model.parameters())
    shapes = {
        name: (module.out_channels, module.in_channels * 9)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }

    cost = measure(nn.Sequential(model), torch.zeros(1, 3, 32, 32))

    assert round(parameters / 1e6, 2) == 20.04
    assert round(cost.dense_macs / 1e9, 3) == 0.398
    assert [min(shape) for shape in shapes.values()] == [27, 64, 128, 128, *[256] * 4, *[512] * 8]


def resnet50(keep: tuple[str, ...] = ()) -> Cost:
    with torch.device("meta"):  # shapes alone: to take its factors would take a minute
        model = ResNet50()
        factorize_(model, keep)
        return measure(model, torch.zeros(1, 3, 224, 224))


def test_the_dense_resnet50_is_that_of_the_paper() -> None:
    cost = resnet50()

    assert (cost.dense_params, cost.dense_macs) == (25_557_032, 4_089_184_256)
    assert len(cost.layers) == 54
    assert cost.macs_at([layer.max_rank for layer in cost.layers]) == cost.dense_macs


def test_resnet50_at_a_quarter_of_its_ranks_has_the_published_parameters() -> None:
    """Pufferfish (MLSys 2021) keeps a quarter: of the last stage, or of all convolutions."""
    full, partial = resnet50(), resnet50(imagenet_resnet50_partial.RECIPE.training.keep)

    convolutions = [
        layer.max_rank // 4 if layer.kind == "conv2d" else layer.max_rank for layer in full.layers
    ]
    last_stage = [layer.max_rank // 4 for layer in partial.layers]
    assert len(last_stage) == 10
    assert round(full.params_at(convolutions) / 1e6, 2) == 9.26
    assert round(partial.params_at(last_stage) / 1e6, 2) == 15.20
    assert partial.dense_params == full.dense_params


def test_lenet_is_that_of_the_paper() -> None:
    model = LeNet()
    parameters = sum(p.numel() for p in model.parameters())
    factorize_(model)

    cost = measure(model, torch.zeros(1, 1, 28, 28))

    assert (parameters, cost.dense_params, cost.dense_macs) == (44_426, 44_426, 281_640)
    assert [layer.max_rank for layer in cost.layers] == [6, 16, 120, 84, 10]
    assert cost.macs_at([1, 1, 1, 1, 1]) == 576 * 31 + 64 * 166 + 376 + 204 + 94


class Mixed(nn.Module):
    """A depthwise convolution, a layer used twice, a layer over positions and one left dense."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.twice(self.twice(self.depthwise(x))))
        return logits


def test_shared_layers_count_each_use_and_dense_ones_are_in_the_rest() -> None:
    model = Mixed()
    factorize_(model, keep=["head"])

    cost = measure(model, torch.zeros(1, 4, 8, 8))

    (twice,) = cost.layers
    assert twice.positions == 2 * 4 * 6  # 4 channels × 6 rows, twice
    assert cost.macs == 4 * 9 * 36 + 3 * 6 * 24
    assert cost.macs_at([2]) == cost.macs + 2 * 12 * 48
    assert cost.params_at([2]) == 40 + 6 + 21 + 24


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv1d(4, 6, 3), (1, 4, 9), 4 * 6 * 3 * 7),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 5), 2 * 3 * 8 * 2 * 3 * 4),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 9, 8), 4 * 9 * 7 * 6),
        (nn.Conv2d(4, 5, 3), (4, 9, 8), 4 * 5 * 9 * 7 * 6),
        # Each number of its input is multiplied with a window of each output channel.
        (nn.ConvTranspose2d(4, 5, 3, stride=2), (1, 4, 6, 7), 4 * 6 * 7 * 5 * 9),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (1, 4, 6), 4 * 6 * 3 * 3),
    ],
)
def test_convolutions_left_dense_are_counted(
    layer: nn.Module, shape: tuple[int, ...], macs: int
) -> None:
    assert measure(nn.Sequential(layer), torch.zeros(shape)).macs == macs


def test_a_layer_that_is_never_called_is_refused() -> None:
    model = Mixed()
    model.add_module("idle", nn.Linear(2, 2))
    factorize_(model)

    with pytest.raises(ValueError, match="layer 'idle' is factorised but never called"):
        measure(model, torch.zeros(1, 4, 8, 8))


class Attending(nn.Module):
    """An attention of a sequence to one of other widths, and to itself by name."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(12, 3, kdim=7, vdim=5, batch_first=True)
        self.own = nn.MultiheadAttention(12, 2, bias=False)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        x, memory = pair
        x, _ = self.cross(x, memory, memory[..., :5])
        y: Tensor = self.own(query=x, key=x, value=x, need_weights=False)[0]
        return y


def test_an_attention_left_dense_costs_what_its_maps_do() -> None:
    pair = torch.zeros(1, 4, 12), torch.zeros(1, 9, 7)
    kept, whole = Attending(), Attending()
    factorize_(kept, keep=["own"])
    factorize_(whole)

    costs = [measure(model, pair) for model in (Attending(), kept, whole)]

    cross = 12 * (12 * 4 + 7 * 9 + 5 * 9 + 12 * 4)
    own = 4 * 12 * 12 * 4
    assert [cost.macs for cost in costs] == [cross + own, own, 0]
    assert [cost.dense_macs for cost in costs] == [cross + own] * 3


def test_an_attention_whose_parent_may_read_its_weight_is_counted() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, dim_feedforward=20, batch_first=True)

    cost = measure(nn.Sequential(layer), torch.zeros(1, 4, 12))

    assert cost.macs == (4 * 12 * 12 + 2 * 12 * 20) * 4


VOCABULARY = 9_521
PAIR = (torch.ones(1, 28, dtype=torch.int64),) * 2
# Pufferfish (Wang et al., MLSys 2021) leaves these dense.
KEPT = ("embedding", "head", "encoder.0.*", "decoder.0.*")


def transformer() -> Transformer:
    with torch.device("meta"):
        dense = Transformer(VOCABULARY)
    model = dense.to_empty(device="cpu")
    model.head.weight = model.embedding.weight  # to_empty parts them
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    return model


def test_the_dense_transformer_is_that_of_the_papers() -> None:
    """44.1 M in 12 layers; 1.37 GMACs are all matrices and the projection, 28 times."""
    table = VOCABULARY * 512

    cost = measure(transformer(), PAIR)

    assert cost.dense_params == 48_978_432
    assert (cost.dense_embedding_params, cost.dense_params - table) == (table, 44_103_680)
    assert cost.dense_macs == (44_040_192 + table) * 28
    assert round(cost.dense_macs / 1e9, 2) == 1.37


@pytest.mark.slow
def test_pufferfish_at_a_quarter_has_the_parameters_of_its_paper() -> None:
    model = transformer()
    factorize_(model, KEPT)

    cost = measure(model, PAIR)

    quarter = [-(-layer.max_rank // 4) for layer in cost.layers]
    assert cost.params_at(quarter) == 26_696_192
    assert cost.embedding_params_at(quarter) == VOCABULARY * 512


class Language(nn.Module):
    """A table that is read three times and projects once."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 12)
        self.map = nn.Linear(12, 12)
        self.head = nn.Linear(12, 40)
        self.head.weight = self.embedding.weight

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        source, target = pair
        x = self.embedding(source).sum(1, keepdim=True) + self.embedding(target)
        logits: Tensor = self.head(self.map(x))
        return logits


def test_an_embedding_costs_macs_only_in_factors_and_parameters_once() -> None:
    model = Language()
    factorize_(model)

    cost = measure(
        model, (torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
    )

    assert [layer.max_rank for layer in cost.layers] == [12, 12]
    rest = 12 + 40  # biases
    assert cost.dense_params == 480 + 144 + rest
    assert cost.dense_macs == (480 + 144) * 3
    assert cost.macs_at([12, 12]) == cost.dense_macs
    assert cost.macs_at([4, 12]) == 4 * 12 * (5 + 3) + 4 * (12 + 40) * 3 + 144 * 3
    assert cost.params_at([4, 12]) == 4 * (12 + 40) + 144 + rest
    assert cost.embedding_params_at([4, 12]) == 4 * (12 + 40)


@pytest.mark.parametrize("keep", ["embedding", "head"])
def test_a_table_left_dense_is_counted_apart(keep: str) -> None:
    model = Language()
    factorize_(model, keep=[keep])

    cost = measure(
        model, (torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
    )

    assert cost.embedding_params_at([3]) == 480
    assert cost.params_at([3]) == 480 + 3 * 24 + 12 + 40
    assert cost.macs_at([3]) == (480 + 3 * 24) * 3


def test_the_small_network_for_cifar_is_as_large_as_it_says() -> None:
    network = ResNet9()
    factorize_(network, ("whitening",))

    cost = measure(network, torch.zeros(1, 3, 32, 32))

    assert (cost.dense_params, cost.dense_macs) == (5_490_986, 376_762_144)
    assert "5.5 M parameters and 377 M MACs" in str(resnet9.__doc__)
