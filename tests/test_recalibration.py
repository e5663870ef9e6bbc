"""Normalisation of a cut network: by its own activations, and the whole's left as it was."""

import copy
from dataclasses import replace
from random import Random

import pytest
import torch
from torch import Tensor, nn

from maestro_core.artifact import Image
from maestro_core.consolidation import consolidation_loss
from maestro_core.data import Augmentation, Pictures
from maestro_core.evaluation import evaluate
from maestro_core.factorize import factorize_, forward_at
from maestro_core.normalisation import evaluating, recalibrate, scratch

CUT = {"0": 2, "4": 3}


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 3),
    )
    factorize_(net)
    return net


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1_000, 6, 6, 1), generator=generator).to(torch.uint8)
    labels = torch.randint(3, (1_000,), generator=generator)
    return Pictures(pixels, labels, Image("L", 6, 6, (0.5,), (0.25,)))


def test_statistics_are_the_mean_and_variance_of_what_the_point_computes(
    model: nn.Sequential, pictures: Pictures
) -> None:
    statistics = recalibrate(model, CUT, pictures)

    x, _ = pictures.batch(slice(None))
    halves = []
    with torch.no_grad():
        for half in torch.split(x, 500):
            y = forward_at(model[:1], {"0": 2}, half)
            halves.append((y.mean((0, 2, 3)), y.var((0, 2, 3))))
    means, variances = (torch.stack(values).mean(0) for values in zip(*halves, strict=True))
    torch.testing.assert_close(statistics["1.running_mean"], means)
    torch.testing.assert_close(statistics["1.running_var"], variances)
    assert set(statistics) == set(scratch(model))


def test_the_second_layer_is_gathered_behind_the_first_as_it_will_be(
    model: nn.Sequential, pictures: Pictures
) -> None:
    few = pictures.first(400)
    statistics = recalibrate(model, CUT, few)

    seen: dict[str, Tensor] = {}
    model[5].register_forward_hook(lambda _m, inputs, y: seen.update(x=inputs[0], y=y))
    with evaluating(model), torch.no_grad():
        forward_at(model, CUT, few.batch(slice(None))[0], buffers=statistics)

    assert seen["y"].mean(0).abs().max() < 0.01
    assert (seen["y"].std(0) - 1).abs().max() < 0.01


def test_statistics_are_of_pictures_changed_as_in_training(
    model: nn.Sequential, pictures: Pictures
) -> None:
    changed = replace(pictures, augmentation=Augmentation(flip=True, cutout=5))
    before = torch.random.get_rng_state()

    statistics = recalibrate(model, CUT, changed)

    assert torch.equal(torch.random.get_rng_state(), before), "training's draws are left alone"
    again, clean = (recalibrate(model, CUT, p) for p in (changed, pictures))
    trained = copy.deepcopy(model)
    for layer in trained.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    torch.manual_seed(1)
    with evaluating(trained, by_batch=True), torch.no_grad():
        for x, _ in changed.augmented(torch.split(torch.arange(1_000), 500)):
            forward_at(trained, CUT, x)
    for name, value in scratch(trained).items():
        if name.endswith("num_batches_tracked"):
            continue
        assert torch.equal(statistics[name], again[name])
        off = (statistics[name] - value).abs().max()
        assert off < 0.3 * (clean[name] - value).abs().max(), name


def test_recalibration_changes_nothing_in_the_network(
    model: nn.Sequential, pictures: Pictures
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(ValueError, match="no_such_layer"):
        recalibrate(model, {"no_such_layer": 1}, pictures)
    recalibrate(model, CUT, pictures)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [model[i].momentum for i in (1, 5)] == [0.1, 0.1]
    assert all(module.training for module in model.modules())


def test_a_network_without_normalisation_has_no_statistics(pictures: Pictures) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    factorize_(plain)

    assert recalibrate(plain, {"1": 1}, pictures) == {}


def test_by_batch_only_the_normalisation_is_as_in_training(
    model: nn.Sequential, pictures: Pictures
) -> None:
    few = pictures.first(500)
    statistics = recalibrate(model, CUT, few)

    by_batch = evaluate(model, few, CUT, by_batch=True)

    assert by_batch.loss == pytest.approx(evaluate(model, few, CUT, statistics).loss, rel=2e-2)
    assert abs(by_batch.loss - evaluate(model, few, CUT).loss) > 0.05, "they must matter here"


def test_one_picture_more_than_a_batch_is_not_normalised_by_itself(
    model: nn.Sequential, pictures: Pictures
) -> None:
    more = pictures.first(501)
    statistics = recalibrate(model, CUT, more)

    by_batch = evaluate(model, more, CUT, by_batch=True)

    assert by_batch.n == 501
    assert by_batch.loss == pytest.approx(evaluate(model, more, CUT, statistics).loss, rel=2e-2)


def test_consolidation_leaves_the_statistics_to_the_whole_network(
    model: nn.Sequential, pictures: Pictures
) -> None:
    x, labels = pictures.batch(slice(0, 64))
    alone = {name: value.clone() for name, value in scratch(model).items()}
    chain = [(1, 1, 1), (2, 3, 2), (4, 6, 3)]

    torch.manual_seed(0)
    consolidation_loss(model, chain, x, labels, Random(0))
    together = scratch(model)
    for name, buffer in model.named_buffers():
        buffer.copy_(alone[name])
    torch.manual_seed(0)
    model(x)

    for name, value in scratch(model).items():
        assert torch.equal(value, together[name]), name


class Frozen(nn.BatchNorm2d):
    """Normalises by the statistics that it was given, in training too."""

    def train(self, mode: bool = True) -> "Frozen":  # noqa: ARG002
        return super().train(False)


def test_a_layer_that_is_frozen_keeps_the_statistics_it_has(
    model: nn.Sequential, pictures: Pictures
) -> None:
    model[1] = Frozen(4).train(False)
    model[1].get_buffer("running_mean").fill_(3.0)

    statistics = recalibrate(model, CUT, pictures)

    assert {name.partition(".")[0] for name in statistics} == {"5"}
    x, _ = pictures.batch(slice(8))
    seen: dict[str, Tensor] = {}
    model[1].register_forward_hook(lambda _m, inputs, y: seen.update(x=inputs[0], y=y))
    with evaluating(model), torch.no_grad():
        forward_at(model, CUT, x, buffers=statistics)
    torch.testing.assert_close(seen["y"], (seen["x"] - 3) / (1 + 1e-5) ** 0.5)
