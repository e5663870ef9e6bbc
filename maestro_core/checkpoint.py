"""Training state on disk: weights, optimiser state and ranks, one directory per finished epoch."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from maestro_core import writing
from maestro_core.factorize import low_rank_layers
from maestro_core.locking import locked
from maestro_core.lod import truncate_

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


class CheckpointError(ValueError):
    """A checkpoint that can't be read, written or used; the message names the file and field."""


@dataclass(frozen=True, slots=True)
class State:
    """Where training stands: finished epochs, and the rank of every factorised layer.

    `run` says what is being trained (recipe, hyper-parameters, data): plain JSON. Its `search`
    binds once there is a `chain`, the points that consolidation trains. `lasso` is the weight of
    the group lasso.
    """

    epoch: int
    ranks: dict[str, int]
    run: dict[str, Any]
    chain: list[tuple[int, ...]]
    lasso: float = 0.0


def save(root: Path, model: nn.Module, optimizer: Optimizer, state: State) -> Path:
    """Write `root/epoch-NNNN` as a whole, drop the older ones, and return it.

    Raises:
        CheckpointError: the disk does not take it; earlier checkpoints are untouched.
    """
    path = root / f"epoch-{state.epoch:04}"
    aside = root / f".{path.name}"
    files = {
        MODEL: safetensors.torch.save(_owned(model.state_dict())),
        OPTIMIZER: safetensors.torch.save(_owned(_optimizer_tensors(model, optimizer))),
        STATE: json.dumps(asdict(state)).encode(),
    }
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, data in files.items():
            writing.write(aside / name, data)
        writing.replace_directory(aside, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for epoch, older in _by_epoch(root).items():
        if epoch < state.epoch:
            shutil.rmtree(older, ignore_errors=True)
    return path


@contextmanager
def kept_in(root: Path) -> Iterator[None]:
    """Make `root`, and keep checkpoints of other trainings out of it until the block ends.

    Whether files can be written there is tried at once: the first epoch may take hours.

    Raises:
        CheckpointError: they can't, or another training runs there.
    """
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(root, wait=False))
            with tempfile.TemporaryFile(dir=root):
                pass
        except BlockingIOError:
            raise CheckpointError(
                f"{root}: another training runs there: choose another output directory"
            ) from None
        except OSError as error:
            path = error.filename if str(error.filename).endswith(".lock") else root
            raise CheckpointError(
                f"{path}: cannot be written: {error.strerror or error}"
            ) from error
        yield


def save_weights(root: Path, name: str, model: nn.Module) -> None:
    """Keep what `model` is now as `name` in `root`, beside the checkpoints, as a whole.

    Raises:
        CheckpointError: the disk does not take it.
    """
    path = _weights(root, name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        writing.write_atomically(path, safetensors.torch.save(_owned(model.state_dict())))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


def load_weights_(root: Path, name: str, model: nn.Module) -> None:
    """Give `model` what `save_weights` kept as `name`.

    Raises:
        CheckpointError: it is missing, damaged or of another network.
    """
    path = _weights(root, name)
    try:
        model.load_state_dict(_read_tensors(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit the network: {error}") from error


def latest(root: Path) -> Path | None:
    """Return the checkpoint in `root` with the most epochs, if there is one."""
    found = _by_epoch(root)
    return found[max(found)] if found else None


def read_state(path: Path) -> State:
    """Return the state of the checkpoint at `path`.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        content: Any = json.loads((path / STATE).read_text())
        chain = [tuple(ranks) for ranks in content["chain"]]
        state = State(content["epoch"], content["ranks"], content["run"], chain, content["lasso"])
        if not (
            isinstance(state.epoch, int)
            and isinstance(state.lasso, int | float)
            and isinstance(state.run, dict)
            and all(isinstance(rank, int) and rank >= 0 for rank in state.ranks.values())
        ):
            raise TypeError("epoch, ranks, run or lasso has the wrong type")
    except OSError as error:
        raise CheckpointError(f"{path / STATE}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / STATE}: not a training state: {error!r}") from error
    return state


def restore_(
    path: Path, model: nn.Module, optimizer: Optimizer | None, run: dict[str, Any]
) -> State:
    """Give `model`, at full rank, and `optimizer` what the checkpoint holds, ranks included.

    Raises:
        CheckpointError: it is damaged, or of another run; the model may then be half-restored.
    """
    state = read_state(path)
    _check_run(path, state, run)
    layers = low_rank_layers(model)
    if set(layers) != set(state.ranks):
        raise CheckpointError(f"{path / STATE}: ranks: not those of {', '.join(layers)}")
    tensors = _read_tensors(path / MODEL)
    try:
        for name, layer in layers.items():
            truncate_(layer, state.ranks[name])
        model.load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path / MODEL}: does not fit the network: {error}") from error
    if optimizer is not None:
        parameters = dict(model.named_parameters())
        for key, value in _read_tensors(path / OPTIMIZER).items():
            name, _, field = key.rpartition("/")
            if name not in parameters:
                raise CheckpointError(f"{path / OPTIMIZER}: '{key}' is of no parameter")
            parameter = parameters[name]
            if value.dim() and value.shape != parameter.shape:
                raise CheckpointError(f"{path / OPTIMIZER}: '{key}' does not fit the network")
            # A number of steps, a scalar, is counted on the host whatever the device.
            optimizer.state[parameter][field] = _like(parameter, value) if value.dim() else value
    return state


def _by_epoch(root: Path) -> dict[int, Path]:
    """Return the checkpoints in `root`: not what is named alike, as somebody's copy may be."""
    found = {path.name.removeprefix("epoch-"): path for path in root.glob("epoch-*")}
    return {int(digits): path for digits, path in found.items() if digits.isdecimal()}


def _weights(root: Path, name: str) -> Path:
    return root / f"{name}.safetensors"


def _check_run(path: Path, state: State, wanted: dict[str, Any]) -> None:
    found, wanted = state.run, json.loads(json.dumps(wanted))
    unused = set() if state.chain else {"search"}
    for key in sorted((found.keys() | wanted.keys()) - unused):
        if found.get(key) != wanted.get(key):
            raise CheckpointError(
                f"{path / STATE}: run.{key} is {found.get(key)!r}, but this run has "
                f"{wanted.get(key)!r}: choose another output directory"
            )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Return `value` where and as `parameter` lies in memory; in a file, channels are outermost."""
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's tensors as PARAMETER/FIELD."""
    return {
        f"{name}/{field}": value
        for name, parameter in model.named_parameters()
        for field, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _owned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies: safetensors refuses tensors that share memory, as tied weights do."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
