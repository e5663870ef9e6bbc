"""What each process of tests/test_distributed.py does: `torchrun … -m tests.data_parallel OUT`."""

import sys
import weakref
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import SGD

from maestro_core import distributed
from maestro_core.data import Data
from maestro_core.factorize import factorize_
from maestro_core.frontier import Chain
from maestro_core.models.transformer import Transformer
from maestro_core.schedule import HyperParameters, Phase
from maestro_core.training import train_, train_epoch_
from tests.test_perplexity import sentences
from tests.test_target import HYPER, network
from tests.test_training import pictures

# Divides into batches of 32, and those by two.
SHRINKING: HyperParameters = replace(
    HYPER,
    phases=(Phase("ordered", 4, 0.05), Phase("nested", 2, 0.05)),
    lasso=2e-2,
    proximal=True,
)
CHAIN: Chain = [(1, 1, 1), (4, 4, 2), (8, 8, 3)]


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3))


def statistics(data: Data, out: Path) -> dict[str, Tensor]:
    """Return the buffers of a network after a batch, after they are shared, and after training."""
    model, trained = normalised(), normalised()
    model(data.train.batch(distributed.parts([torch.arange(64)])[0])[0])
    found = {f"own.{name}": value.clone() for name, value in model.named_buffers()}
    distributed.share_buffers_(model)
    found |= {f"shared.{name}": value for name, value in model.named_buffers()}
    hyper = replace(SHRINKING, phases=(Phase("ordered", 1, 0.05),), lasso=0.0)
    train_(
        trained, data, hyper, lambda: [(1,), (3,)], out / "normalised", {}, Progress(disable=True)
    )
    return found | {f"trained.{name}": value for name, value in trained.named_buffers()}


def train_on_text() -> dict[str, Tensor]:
    """Return the parameters after an epoch on sentences of many lengths."""
    torch.manual_seed(0)
    model = Transformer(20, width=12, layers=1, heads=2, hidden=16, dropout=0.0)
    factorize_(model)
    hyper = replace(SHRINKING, phases=(Phase("ordered", 1, 0.05),), batch_size=8)
    optimizer = SGD(model.parameters(), momentum=0.9)
    train_epoch_(model, optimizer, sentences(64, 0), hyper, 0, [], lambda: None)
    return {name: value.detach().contiguous() for name, value in model.named_parameters()}


def skipping() -> dict[str, Tensor]:
    """Return the gradients that there are where each process skips other layers, and all one."""
    model = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in ("0", "1", "both", "no")})
    used = [model["both"], model[str(distributed.rank())]]
    loss = torch.stack([layer(torch.tensor([2.0, 4.0])).sum() for layer in used]).sum()
    torch.autograd.backward(loss)
    distributed.average_(model, loss, torch.zeros(3))
    found = {name: p.grad for name, p in model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def main(out: Path) -> None:
    """Train, and write what came of it under this process' rank."""
    torch.set_num_threads(1)
    data = Data(pictures(320, 0), pictures(100, 1), pictures(100, 2), "blobs", "0")
    model = network()
    with distributed.joined():
        group = weakref.ref(dist.group.WORLD) if distributed.size() > 1 else None
        # Each finds another chain; all must train the first one's.
        found = [tuple(min(r + distributed.rank(), 3) for r in CHAIN[0]), *CHAIN[1:]]
        bar = Progress(disable=True)
        chain = train_(model, data, SHRINKING, lambda: found, out / "checkpoints", {}, bar)
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        tensors["chain"] = torch.tensor(chain)
        name = f"{distributed.rank()}-of-{distributed.size()}.safetensors"
        save_file(tensors, out / name)
        save_file(statistics(data, out), out / f"statistics-{name}")
        save_file(train_on_text(), out / f"text-{name}")
        save_file(skipping(), out / f"skipping-{name}")
    if group and group():
        raise RuntimeError("the group, and its threads, outlive the block")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
