"""Filters that whiten windows, and the network that begins with them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maestro_core.data import Pictures
from maestro_core.models.resnet9 import Convolution, ResNet9, prepare_
from maestro_core.recipes.cifar10 import IMAGE
from maestro_core.windows import whitening_filters


def pictures(n: int = 32) -> Pictures:
    """Return smooth noise, whose neighbouring pixels are alike, as those of pictures are."""
    noise = torch.rand(n, 3, 36, 36, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(noise, 5, stride=1)
    pixels = (smooth * 255).permute(0, 2, 3, 1).to(torch.uint8).contiguous()
    return Pictures(pixels, torch.zeros(n, dtype=torch.int64), IMAGE)


def test_windows_come_out_unrelated_and_of_one_size() -> None:
    x, _ = pictures().batch(slice(None))

    filters = whitening_filters(x, 2)

    assert filters.shape == (24, 3, 2, 2)
    y = F.conv2d(x, filters[:12]).transpose(0, 1).flatten(1)
    moments = y @ y.t() / y.shape[1]
    off = moments - torch.diag(moments.diagonal())
    assert off.abs().max() < 1e-3
    # A little under 1 where a direction varies little: LEAST_VARIANCE is added to each.
    assert moments.diagonal().min() > 0.5
    assert moments.diagonal().max() < 1.001
    torch.testing.assert_close(filters[12:], -filters[:12])


def test_pictures_of_one_colour_have_filters_too() -> None:
    assert whitening_filters(torch.zeros(4, 3, 8, 8), 2).isfinite().all()


def test_the_first_layer_is_set_and_not_trained() -> None:
    model = ResNet9(width=0.125)
    before = model.whitening.weight.clone()

    prepare_(model, pictures())

    assert not torch.equal(model.whitening.weight, before)
    x, _ = pictures().batch(slice(0, 2))
    model(x).sum().backward()
    assert model.whitening.weight.grad is None
    assert all(p.grad is not None for p in model.body.parameters() if p.requires_grad)


def test_a_network_of_another_kind_is_named() -> None:
    with pytest.raises(TypeError, match="a Linear has no layer that whitens"):
        prepare_(nn.Linear(2, 2), pictures())


def test_a_convolution_begins_with_a_copy_of_its_input() -> None:
    convolution = Convolution(4, 6)[0]
    x = torch.randn(2, 4, 8, 8)

    torch.testing.assert_close(convolution(x)[:, :4], x)
