"""The artifact of a network, run by plain ONNX Runtime, against torch at the same ranks."""

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maestro_core import export as exporting
from maestro_core.accounting import measure
from maestro_core.artifact import Artifact, ArtifactError, Image, Score
from maestro_core.data import Pictures
from maestro_core.evaluation import evaluate
from maestro_core.export import Description, export
from maestro_core.exportable import check_embeddings, check_exportable
from maestro_core.factorize import factorize_, forward_at, low_rank_layers
from maestro_core.lod import truncate_
from maestro_core.normalisation import recalibrate
from maestro_core.search import Point, by_name, make_points
from maestro_core.template import ExportError

CHAIN = [(1, 0, 1, 0), (1, 2, 1, 2), (2, 9, 3, 4), (2, 12, 10, 6), (4, 20, 18, 8)]


class Net(nn.Module):
    """A strided and dilated convolution, a layer over positions, one left dense, normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, (3, 1), padding=(1, 0), bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 20, 3, stride=2, padding=2, dilation=2)
        self.depthwise = nn.Conv2d(20, 20, 2, groups=20)
        self.norm2 = nn.BatchNorm2d(20)
        self.over = nn.Linear(20, 24)
        self.head = nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.depthwise(self.conv2(self.norm(self.conv1(x)).relu()).relu()))
        x = self.over(x.flatten(2).transpose(1, 2)).relu()  # (b, 9, 24)
        logits: Tensor = self.head(x.mean(1))
        return logits


def network() -> Net:
    torch.manual_seed(0)
    model = Net()
    for norm, channels in ((model.norm, 4), (model.norm2, 20)):
        norm.load_state_dict(
            {
                "weight": torch.rand(channels) + 0.5,
                "bias": torch.rand(channels),
                "running_mean": torch.rand(channels),
                "running_var": torch.rand(channels) + 0.5,
                "num_batches_tracked": torch.tensor(1),
            }
        )
    factorize_(model)
    truncate_(low_rank_layers(model)["over"], 18)
    return model.eval()


def pictures(n: int = 90) -> Pictures:
    generator = torch.Generator().manual_seed(0)
    return Pictures(
        torch.randint(0, 256, (n, 8, 8, 3), generator=generator).to(torch.uint8),
        torch.randint(8, (n,), generator=generator),
        Image("RGB", 8, 8, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)),
    )


DESCRIPTION = Description("net", "image-classification", tuple("abcdefgh"), "noise", {"seed": 0})


def write(model: nn.Module, path: Path) -> Artifact:
    cost = measure(model, torch.zeros(1, 3, 8, 8))
    return export(model, cost, points(model), pictures(), DESCRIPTION, path, lambda: None)


def points(model: nn.Module) -> list[Point]:
    """Return the points of CHAIN, each normalised by what it computes."""
    names = list(low_rank_layers(model))
    return [
        Point(ranks, recalibrate(model, dict(zip(names, ranks, strict=True)), pictures()))
        for ranks in CHAIN
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write(network(), tmp_path_factory.mktemp("export") / "net.maestro")


@pytest.mark.parametrize("point", range(len(CHAIN)))
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_every_point_computes_what_torch_does_at_its_ranks(
    exported: Artifact, point: int, batch: int
) -> None:
    model = network()
    x = torch.randn(batch, 3, 8, 8)
    ranks = by_name(measure(model, x[:1]), CHAIN[point])
    statistics = points(model)[point].statistics

    session = ort.InferenceSession(exported.graph_path(point), providers=["CPUExecutionProvider"])
    output = session.run(None, {"image": x.numpy()})[0]

    with torch.no_grad():
        expected = forward_at(model, ranks, x, buffers=statistics).numpy()
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4)


def test_each_point_has_its_own_normalisation(exported: Artifact) -> None:
    means: dict[str, set[tuple[float, ...]]] = {"norm": set(), "norm2": set()}
    for point in range(len(CHAIN)):
        graph = onnx.load(exported.graph_path(point)).graph
        for name, seen in means.items():
            mean = next(t for t in graph.initializer if t.name == f"{name}.running_mean")
            seen.add(tuple(numpy_helper.to_array(mean)))

    assert len(means["norm"]) == len({ranks[0] for ranks in CHAIN}), "it follows the first layer"
    # The exporter would fuse it into the convolution that is left dense, once for all points.
    assert len(means["norm2"]) == len({ranks[:2] for ranks in CHAIN})


def test_every_point_is_plain_onnx(exported: Artifact) -> None:
    for point in range(len(CHAIN)):
        path = exported.graph_path(point)
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(path, load_external_data=False)

        assert {entry.domain for entry in graph.opset_import} <= {"", "ai.onnx"}


def test_no_graph_holds_a_path_of_the_machine_that_made_it(exported: Artifact) -> None:
    for path in exported.path.glob("points/*.onnx"):
        text = path.read_bytes()

        assert b".py" not in text, path.name
        assert str(Path(__file__).parents[1]).encode() not in text, path.name


def test_points_are_scored_and_costed_as_a_whole(exported: Artifact) -> None:
    model = network()
    cost = measure(model, torch.zeros(1, 3, 8, 8))

    for point, trained in zip(exported.points, points(model), strict=True):
        ranks = by_name(cost, trained.ranks)
        result = evaluate(model, pictures(), ranks, trained.statistics)
        assert point.ranks == trained.ranks
        assert point.score == Score.of_share(result.correct, 90)
        assert point.macs == cost.macs_at(point.ranks)
    assert exported.points[-1].macs == exported.manifest.dense_macs
    assert exported.manifest.input.shape == (-1, 3, 8, 8)
    assert exported.manifest.metric.samples == 90


class Attentive(nn.Module):
    """Rows of a picture attend to each other; where they are is an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(24, 12)
        self.place = nn.Embedding(8, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rows(x.transpose(1, 2).flatten(2)) + self.place(torch.arange(8))  # (b, 8, 12)
        logits: Tensor = self.head(self.attention(h, h, h)[0].mean(1))
        return logits


def test_attention_is_exported_and_its_maps_are_cut(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attentive()
    factorize_(model, keep=["place"])
    cost = measure(model, torch.zeros(1, 3, 8, 8))
    chain = [Point(ranks, {}) for ranks in ((2, 1, 2, 3, 4, 3), (12, 12, 12, 12, 12, 8))]

    made = export(model, cost, chain, pictures(), DESCRIPTION, tmp_path / "a.maestro", lambda: None)

    names = [f"attention.{part}" for part in ("query", "key", "value", "output")]
    assert [layer.name for layer in made.manifest.layers] == ["rows", *names, "head"]
    assert made.points[0].macs < made.points[1].macs


class Padded(Attentive):
    """Dark rows are padding."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.rows(x.transpose(1, 2).flatten(2))
        dark = x.mean((1, 3)) < -0.2
        logits: Tensor = self.head(self.attention(h, h, h, dark, need_weights=False)[0].mean(1))
        return logits


def test_attention_to_padded_samples_is_exported() -> None:
    model = Padded()
    del model.place

    names = check_exportable(model, [], pictures().image, 8)

    assert names[1:-1] == [f"attention.{part}" for part in ("query", "key", "value", "output")]


class Alike(nn.Module):
    """Two layers of the same shape, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24, bias=False)
        self.second = nn.Linear(24, 24, bias=False)
        self.twice = nn.Linear(24, 24)
        self.head = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x.mean(3).flatten(1)
        h = h + self.first(h) + self.second(h).relu()
        logits: Tensor = self.head(self.twice(self.twice(h).relu()))
        return logits


def test_alike_layers_of_rank_0_and_one_called_twice_are_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Alike()
    factorize_(model, keep=["head"])
    for name in ("first", "second"):
        truncate_(low_rank_layers(model)[name], 0)
    cost = measure(model, torch.zeros(1, 3, 8, 8))
    chain = [Point(ranks, {}) for ranks in ((0, 0, 3), (0, 0, 24))]

    made = export(model, cost, chain, pictures(), DESCRIPTION, tmp_path / "a.maestro", lambda: None)

    head = 24 * 8
    assert [point.macs for point in made.points] == [2 * 3 * 48 + head, 2 * 24 * 24 + head]
    for i, point in enumerate(chain):
        session = ort.InferenceSession(made.graph_path(i), providers=["CPUExecutionProvider"])
        x = torch.randn(3, 3, 8, 8)
        with torch.no_grad():
            expected = forward_at(model, by_name(cost, point.ranks), x).numpy()
        output = session.run(None, {"image": x.numpy()})[0]
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4)


class Repeated(nn.Module):
    """One block under two names, one normalisation in it, and another that has seen as little."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU())
        self.again = self.block
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x.mean(3).flatten(1)
        logits: Tensor = self.head(self.norm(self.again(self.block(h))))
        return logits


def test_a_module_under_two_names_and_statistics_that_are_alike_are_exported(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = Repeated()
    factorize_(model)
    cost = measure(model, torch.zeros(1, 3, 8, 8))
    chain = [
        Point(ranks, recalibrate(model, by_name(cost, ranks), pictures()))
        for ranks in ((3, 2), (24, 8))
    ]

    made = export(model, cost, chain, pictures(), DESCRIPTION, tmp_path / "r.maestro", lambda: None)

    assert [layer.name for layer in made.manifest.layers] == ["block.0", "head"]
    assert made.points[0].macs == 2 * 3 * 48 + 2 * 32
    for i, point in enumerate(chain):
        session = ort.InferenceSession(made.graph_path(i), providers=["CPUExecutionProvider"])
        x = torch.randn(3, 3, 8, 8)
        with torch.no_grad():
            expected = forward_at(
                model, by_name(cost, point.ranks), x, buffers=point.statistics
            ).numpy()
        output = session.run(None, {"image": x.numpy()})[0]
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4)


def test_an_embedding_in_two_factors_is_refused(tmp_path: Path) -> None:
    model = Attentive()
    factorize_(model)
    cost = measure(model, torch.zeros(1, 3, 8, 8))

    with pytest.raises(ExportError, match=r"'place' is an embedding, which .* only dense: name it"):
        export(model, cost, [], pictures(), DESCRIPTION, tmp_path / "a.maestro", lambda: None)
    with pytest.raises(ExportError, match="'place'"):
        check_embeddings(Attentive(), keep=["head"])
    check_embeddings(Attentive(), keep=["pla*"])
    assert not list(tmp_path.iterdir())


def test_a_network_needs_one_output_for_each_label(tmp_path: Path) -> None:
    fewer = replace(DESCRIPTION, labels=tuple("abcdefg"))
    model = network()
    cost, path = measure(model, torch.zeros(1, 3, 8, 8)), tmp_path / "net.maestro"

    with pytest.raises(ExportError, match=r"is \(64, 8\); for 7 labels it must be \(64, 7\)"):
        export(model, cost, points(model), pictures(), fewer, path, lambda: None)
    with pytest.raises(ExportError, match=r"batch of 2 is \(2, 8\); for 9 labels"):
        check_exportable(Net(), [], pictures().image, 9)
    check_exportable(Net(), [], pictures().image, 8)
    assert not list(tmp_path.iterdir())


def test_a_network_without_factors_is_exported_with_the_statistics_it_has(tmp_path: Path) -> None:
    model = Net().eval()
    cost = measure(model, torch.zeros(1, 3, 8, 8))

    found = make_points(model, cost, [()], pictures(), pictures(), lambda *_: None)
    made = export(model, cost, found, pictures(), DESCRIPTION, tmp_path / "net", lambda: None)

    assert [point.ranks for point in made.points] == [()]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(24)
        self.fc = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.norm(x.mean(3).flatten(1)))


class InPairs(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class PairsInTraining(Small):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x), x) if self.training else super().forward(x)


class OfTwo(Small):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        z: Tensor = super().forward(x + y)
        return z


class Centred(Small):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x - x.mean(0))
        return y


class Random(Small):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(F.dropout(x, training=True))
        return y


class Normalising(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.norm(x.mean(3)).flatten(1))
        return y


class Activated(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class NormalisingAndMore(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Activated(24)


class Synchronised(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.SyncBatchNorm(24)  # type: ignore[assignment]


class Otherwise(Small):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y * 1.1 if torch.onnx.is_in_onnx_export() else y


class Viewing(Small):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(216, 8)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(x).view(len(x), -1))
        return logits


class ViewingOne(Viewing):
    """What comes in lies as it would in most programs, so only what the factors make does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(torch.empty(len(x), 1, 8, 8).copy_(x[:, :1]))
        return y


class Reading(Small):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.to(self.fc.weight.dtype))


class Double(Small):
    def __init__(self) -> None:
        super().__init__()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x.double())
        return y.float()


class DoubleOutput(Small):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y.double()


class Decomposing(Small):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) + torch.linalg.svdvals(x).sum((1, 2))[:, None]
        return y


class NotCopied(Small):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = (i for i in range(3))


class Remembering(Small):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}


class Recomputing(Small):
    """Saves memory: what a part of it computes is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.part = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Any:
        h = self.first(x.mean(3).flatten(1))
        if self.training and torch.is_grad_enabled():
            return self.fc(checkpoint(self.part, h, use_reentrant=True))
        return self.fc(self.part(h))


class Frozen(Small):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class WithoutGradients(Small):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class OfOneSize(Small):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.reshape(len(x), 3, 8, 8))


class NamedAsInput(Small):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y + self.image


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Viewing, r"fails on a batch of 2: view size is not .* Use \.reshape"),
        (ViewingOne, r"fails on a batch of 2: view size is not .* Use \.reshape"),
        (Reading, "reads 'weight' of 'fc', which it has no more in factors: name it in `keep`"),
        (Double, "'fc' holds float64, and factors hold float32: convert it, or name it"),
        (DoubleOutput, "output is float64; it must be float32"),
        (Decomposing, "^torch can't export the network: No ONNX function found for"),
        (NotCopied, "^the network can't be copied: cannot pickle 'generator' object"),
        (Remembering, "'_extra_state' is a dict; checkpoints hold tensors"),
        (
            Recomputing,
            "'part' is computed again in the backward pass, as by torch.utils.checkpoint",
        ),
        (Frozen, "^no parameter of the network is trained: one at least must have requires_grad"),
        (WithoutGradients, "its forward may not be under torch.no_grad"),
        (OfOneSize, r"for batches of 2 alone: .* takes the size from x\.shape\[0\], not from len"),
        (NamedAsInput, "'image' is what graphs call their own"),
        (InPairs, "output for a batch of 2 is a tuple; for 8 labels it must be"),
        (PairsInTraining, "output in training for a batch of 2 is a tuple"),
        (OfTwo, "fails on a batch of 2: .* missing 1 required positional argument: 'y'"),
        (Centred, "depends on what else is in its batch"),
        (Random, "or on chance"),
        (Normalising, "batch normalisation must have running statistics"),
        (
            NormalisingAndMore,
            r"^'norm' \(Activated\) is batch .* forward of its own, .*: put what it adds, as an",
        ),
        (Otherwise, "ONNX Runtime's output differs from torch's"),
    ],
)
def test_a_network_that_can_not_be_served_is_refused_untrained(
    network: type[Small], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        check_exportable(network(), [], pictures().image, 8)
    check_exportable(Small(), [], pictures().image, 8)


def test_normalisation_across_processes_is_exported_as_any_other() -> None:
    assert check_exportable(Synchronised(), [], pictures().image, 8) == ["fc"]


class Neighbours(Small):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(F.local_response_norm(x, 2))
        return y


def test_pads_of_five_dimensions_are_read_by_the_runtime() -> None:
    assert check_exportable(Neighbours(), [], pictures().image, 8) == ["fc"]


def test_a_weight_that_is_no_number_is_named_untrained() -> None:
    model = Small()
    model.fc.weight.data[0, 0] = torch.nan

    with pytest.raises(ExportError, match=r"'fc\.weight' holds values that are not numbers"):
        check_exportable(model, [], pictures().image, 8)


def test_what_is_no_artifact_is_not_replaced(tmp_path: Path) -> None:
    notes = tmp_path / "work" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("of a year")

    for path in (notes.parent, notes):
        with pytest.raises(ArtifactError, match="is there, and is no artifact"):
            write(network(), path)

    assert notes.read_text() == "of a year"
    assert list(tmp_path.rglob("*")) == [notes.parent, notes]


def test_an_empty_directory_and_an_artifact_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "net.maestro"
    path.mkdir()

    assert write(network(), path).digest == write(network(), path).digest


def test_a_disk_that_takes_no_temporary_files_is_named() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(ExportError, match=r"^/.*: cannot be written: File too large"):
            check_exportable(Small(), [], pictures().image, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Untrue(Net):
    """In ONNX a thousandth more than in torch."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits * 1.001 if torch.onnx.is_in_onnx_export() else logits


class UntrueAndConverting(Untrue):
    """It can't run in 64 bits, which say how much is rounding."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x.float())
        return logits


@pytest.mark.parametrize("untrue", [Untrue, UntrueAndConverting])
def test_a_point_that_computes_something_else_is_not_saved(
    untrue: type[Net], tmp_path: Path
) -> None:
    model = network()
    model.__class__ = untrue

    with pytest.raises(ExportError, match=r"points/0\d\.onnx: ONNX Runtime's output differs"):
        write(model, tmp_path / "net.maestro")
    assert not list(tmp_path.iterdir())


def test_what_rounding_explains_is_no_difference(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():  # channels that differ in their fifth digit, normalised to 1
        model.get_parameter("conv2.bias").fill_(3e4)
        model.depthwise.weight.fill_(1.0)

    exported = write(model, tmp_path / "net.maestro")

    x, _ = pictures().batch(slice(64))
    session = ort.InferenceSession(exported.graph_path(4), providers=["CPUExecutionProvider"])
    names = dict(zip(low_rank_layers(model), CHAIN[4], strict=True))
    with torch.no_grad():
        expected = forward_at(model, names, x, buffers=points(model)[4].statistics).numpy()
    error = np.abs(session.run(None, {"image": x.numpy()})[0] - expected).max()
    assert error > exporting.TOLERANCE * np.abs(expected).max(), "nothing was rounded much"
