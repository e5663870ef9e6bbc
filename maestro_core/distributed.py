"""Training in several processes (torchrun), each with its part of every batch.

Networks are the same in all of them after every step: ranks are drawn from one seed, gradients are
averaged in one message, and what shrinks follows from both. Not torch's DistributedDataParallel,
whose messages are laid out once, for parameters that keep their shapes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from maestro_core.frontier import Chain
from maestro_core.loss import IGNORED

T = TypeVar("T")


class FirstFailed(ValueError):  # noqa: N818  it says what happened
    """What the first process does for all failed there, and it says why."""


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that torchrun started, if it did, until the block ends."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    # Optimisers import it, and its defaults keep the group that is there when it is imported. That
    # group's threads would outlive the block, and can abort a process that ends.
    import_module("torch.distributed.nn")
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this is, from 0; the first alone writes files."""
    return dist.get_rank() if size() > 1 else 0


def by_first(work: Callable[[], T]) -> T | None:
    """Have the first process do `work`, the others wait for it; return what came of it, or None.

    Raises:
        FirstFailed: in the others, where `work` failed; the first raises what that did.
    """
    done, failed = None, torch.ones(1)
    try:
        if rank() == 0:
            done = work()
            failed.zero_()
    finally:
        if size() > 1:
            dist.broadcast(failed, 0)
    if failed and rank() > 0:
        raise FirstFailed(f"process {rank()} of {size()} stops: the first failed, and says why")
    return done


def parts(batches: Sequence[Tensor]) -> list[Tensor]:
    """Return this process' part of each batch, (n,); all are of one size, so a rest is left out.

    Raises:
        ValueError: there are more processes than any batch has samples.
    """
    own = [batch[: len(batch) // size() * size()][rank() :: size()] for batch in batches]
    if not any(map(len, own)):
        raise ValueError(f"{size()} processes can't share batches of {len(batches[0])}")
    return [part for part in own if len(part)]


def average_(model: nn.Module, loss: Tensor, labels: Tensor) -> Tensor:
    """Set the gradients to their means over all processes; return the mean of the losses.

    A parameter that one process left out, as of a layer that it skipped, has a gradient of zero
    there; what all left out has none, as in one process.
    `loss` is a mean over this process' `labels`. Parts of a batch have as many pictures but not as
    many tokens, so each label that is not IGNORED weighs the same. The mean of the losses is not
    finite in any process if a loss is not in one, so that all stop together.
    """
    if size() == 1:
        return loss.detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    message = torch.cat([value.flatten() for value in (*gradients, loss.detach().float())])
    count = (labels != IGNORED).sum().to(message)
    used = torch.tensor([p.grad is not None for p in trained]).to(message)
    message = torch.cat([message * count, count.view(1), used])
    dist.all_reduce(message)
    sums, count, used = torch.split(message, [len(message) - 1 - len(used), 1, len(used)])
    *means, mean = torch.split(sums / count, [*(g.numel() for g in gradients), 1])
    for parameter, gradient, value, users in zip(
        trained, gradients, means, used.tolist(), strict=True
    ):
        if users:
            parameter.grad = gradient.copy_(value.view_as(gradient))
    return mean[0]


def share_buffers_(model: nn.Module) -> None:
    """Give every process the first one's buffers: each normalised by its own part of a batch."""
    if size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def agreed(chain: Chain) -> Chain:
    """Return the first process' chain in all of them."""
    if size() == 1:
        return chain
    shape = torch.tensor([len(chain), len(chain[0])])
    dist.broadcast(shape, 0)
    table = torch.tensor(chain) if rank() == 0 else torch.zeros(*shape.tolist(), dtype=torch.int64)
    dist.broadcast(table, 0)
    return [tuple(ranks) for ranks in table.tolist()]
