"""Whitened factors, against the least error that any matrix of that rank can have."""

import pytest
import torch
from torch import Tensor, nn

from maestro_core.factorize import factorize_, low_rank_layers
from maestro_core.layers import LowRankEmbedding
from maestro_core.whitening import second_moments, whiten_


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 4)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))
        return y


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    net = Net().double()
    factorize_(net)
    return net


def batches(n: int = 4) -> list[Tensor]:
    """Return pictures (8, 2, 7, 8) with some directions much larger than others."""
    torch.manual_seed(1)
    scale = torch.linspace(0.05, 3, 7)[:, None]
    return [torch.randn(8, 2, 7, 8).double() * scale for _ in range(n)]


def test_the_whole_layer_computes_what_it_did(model: Net) -> None:
    x = batches(1)[0]
    before = model.eval()(x)

    whiten_(model, batches())

    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["conv", "fc"])
def test_no_matrix_of_the_rank_has_less_error(model: Net, name: str) -> None:
    """The least error is that of the whole outputs' own truncated SVD (Eckart and Young)."""
    model.eval()
    layer = low_rank_layers(model)[name]
    assert not isinstance(layer, LowRankEmbedding)
    inputs: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    for x in batches():
        model(x)
    x, bias = torch.cat(inputs), layer.bias
    assert bias is not None
    plain = [outputs(layer(x, rank), bias) for rank in range(layer.rank + 1)]
    whole = plain[-1]
    s = torch.linalg.svd(whole, full_matrices=False).S

    whiten_(model, batches())

    for rank in range(layer.rank):
        least = s[rank:].square().sum()
        error = (outputs(layer(x, rank), bias) - whole).square().sum()
        assert least * 0.999 <= error <= least * 1.01
        assert error <= (plain[rank] - whole).square().sum() * 1.01


def outputs(y: Tensor, bias: Tensor) -> Tensor:
    """Return y without its bias as rows (n, out)."""
    rows = y.movedim(1, -1).flatten(0, -2) if y.dim() == 4 else y
    return (rows - bias).detach()


def test_moments_add_up_over_batches_and_leave_the_model_alone(model: Net) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    together = second_moments(model, [torch.cat(batches())])

    apart = second_moments(model, batches())

    assert set(apart) == {"conv", "fc"}
    assert model.training
    for name, moment in apart.items():
        torch.testing.assert_close(moment, together[name])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_layers_without_any_input_keep_their_factors(model: Net) -> None:
    unused = low_rank_layers(model)["unused"]
    before = unused.down.detach().clone()

    whiten_(model, [torch.zeros(2, 2, 7, 8).double()])

    assert torch.equal(unused.down, before)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
