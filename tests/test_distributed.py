"""Two processes under torchrun, over gloo: the same network in both, and the one that one makes."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maestro_core import checkpoint, distributed
from tests import data_parallel

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone")
    data_parallel.main(path)
    return path


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("together")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    worker = ["--nproc-per-node", "2", "-m", "tests.data_parallel", str(path)]

    done = subprocess.run([*torchrun, *worker], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def both(path: Path) -> list[str]:
    """Return the last line that each of two processes, which fail in `path`, says of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}

    def run(rank: int) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tests.data_parallel", str(path)],
            cwd=ROOT,
            env={**os.environ, **group, "RANK": str(rank)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 1
        return done.stderr.splitlines()[-1]

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


@pytest.mark.slow
def test_two_processes_train_the_network_that_one_does(together: Path, alone: Path) -> None:
    first, second = (load_file(together / f"{rank}-of-2.safetensors") for rank in (0, 1))
    one = load_file(alone / "0-of-1.safetensors")
    assert first.keys() == second.keys() == one.keys()
    assert first["chain"].tolist() == [list(ranks) for ranks in data_parallel.CHAIN]
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-3)
    states = [checkpoint.latest(path / "checkpoints") for path in (together, alone)]
    ranks = [checkpoint.read_state(path).ranks for path in states if path]
    assert ranks[0] == ranks[1]
    assert any(r < full for r, full in zip(ranks[0].values(), (36, 30, 3), strict=True))


@pytest.mark.slow
def test_all_processes_have_the_statistics_of_the_first(together: Path) -> None:
    first, second = (load_file(together / f"statistics-{r}-of-2.safetensors") for r in (0, 1))

    mean = "1.running_mean"
    assert not torch.equal(first[f"own.{mean}"], second[f"own.{mean}"])
    for name in (mean, "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(first[f"shared.{name}"], first[f"own.{name}"])
        assert torch.equal(second[f"shared.{name}"], first[f"own.{name}"])
        assert torch.equal(second[f"trained.{name}"], first[f"trained.{name}"])
    assert first["trained.1.num_batches_tracked"] == 10


@pytest.mark.slow
def test_each_token_weighs_the_same_whichever_process_has_it(together: Path, alone: Path) -> None:
    first, second = (load_file(together / f"text-{rank}-of-2.safetensors") for rank in (0, 1))
    for name, value in load_file(alone / "text-0-of-1.safetensors").items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_layer_that_one_process_skips_has_half_its_gradient_in_both(together: Path) -> None:
    half, whole = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 4.0]])

    for rank in (0, 1):
        found = load_file(together / f"skipping-{rank}-of-2.safetensors")
        assert found.keys() == {"0.weight", "1.weight", "both.weight"}  # all skip the fourth
        assert torch.equal(found["0.weight"], half)
        assert torch.equal(found["1.weight"], half)
        assert torch.equal(found["both.weight"], whole)


@pytest.mark.slow
def test_all_stop_where_another_training_holds_the_directory(tmp_path: Path) -> None:
    with checkpoint.kept_in(tmp_path / "checkpoints"):
        first, second = both(tmp_path)

    assert "another training runs there" in first
    assert second.endswith("FirstFailed: process 1 of 2 stops: the first failed, and says why")


@pytest.mark.slow
def test_all_stop_where_a_checkpoint_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".epoch-0001").write_text("in the way")

    first, second = both(tmp_path)

    assert "epoch-0001: cannot be written: File exists" in first
    assert second.endswith("FirstFailed: process 1 of 2 stops: the first failed, and says why")


def test_one_process_alone_has_it_all() -> None:
    model, indices = torch.nn.Linear(2, 1), torch.arange(7)
    loss = model(torch.ones(3, 2)).sum()
    torch.autograd.backward(loss)
    before = model.weight.grad

    with distributed.joined():
        assert (distributed.rank(), distributed.size()) == (0, 1)
        (whole,) = distributed.parts([indices])
        assert torch.equal(whole, indices)
        assert distributed.average_(model, loss, torch.zeros(3)) == loss
        assert distributed.agreed([(1, 2)]) == [(1, 2)]
        assert distributed.by_first(lambda: "done") == "done"
    assert model.weight.grad is before


def test_more_processes_than_a_batch_has_samples_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "size", lambda: 4)
    monkeypatch.setattr(distributed, "rank", lambda: 1)

    assert [part.tolist() for part in distributed.parts([torch.arange(9), torch.arange(3)])] == [
        [1, 5]
    ]
    with pytest.raises(ValueError, match="4 processes can't share batches of 3"):
        distributed.parts([torch.arange(3)])
