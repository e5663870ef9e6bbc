"""A network and its answer to the mirror image, in torch, in MACs and in ONNX."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from maestro_core.accounting import measure
from maestro_core.factorize import factorize_
from maestro_core.models.mirrored import Mirrored
from maestro_core.template import make_template


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))


def test_a_picture_and_its_mirror_image_get_the_same_answer() -> None:
    plain, x = network(), torch.randn(3, 3, 8, 8)
    model = Mirrored(plain).eval()

    torch.testing.assert_close(model(x), (plain(x) + plain(x.flip(3))) / 2)
    torch.testing.assert_close(model(x), model(x.flip(3)))


def test_training_sees_pictures_as_they_come() -> None:
    plain, x = network(), torch.randn(3, 3, 8, 8)

    assert torch.equal(Mirrored(plain).train()(x), plain(x))


def test_it_costs_two_of_the_network() -> None:
    model = Mirrored(network())
    factorize_(model)

    cost = measure(model, torch.randn(1, 3, 8, 8))

    assert cost.dense_macs == 2 * (4 * 3 * 9 * 36 + 5 * 4 * 36)
    assert cost.dense_params == 4 * 3 * 9 + 4 + 5 * 4 * 36 + 5


def test_its_graph_takes_batches_of_any_size(tmp_path: Path) -> None:
    model = Mirrored(network()).eval()
    file = tmp_path / "model.onnx"
    file.write_bytes(make_template(model, torch.randn(2, 3, 8, 8)).SerializeToString())
    session = ort.InferenceSession(file)

    for size in (1, 3):
        x = torch.randn(size, 3, 8, 8)
        (found,) = session.run(None, {"image": x.numpy()})
        np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
