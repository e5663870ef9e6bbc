"""The loop on a few hundred made-up pictures: it learns, repeats, resumes and stops cleanly."""

import copy
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

from maestro_core import averaging, checkpoint
from maestro_core.artifact import Image
from maestro_core.checkpoint import CheckpointError
from maestro_core.data import Data, Pictures
from maestro_core.evaluation import evaluate
from maestro_core.factorize import factorize_, low_rank_layers
from maestro_core.frontier import Chain
from maestro_core.normalisation import recalibrate
from maestro_core.sampling import Sampling
from maestro_core.schedule import HyperParameters, Kind, Phase, learning_rate
from maestro_core.target import Target
from maestro_core.training import Diverged, NothingLeft, train_
from maestro_core.whitening import whiten_
from tests.stops import Stops

RATE = 0.05
HYPER = HyperParameters(
    phases=(Phase("ordered", 4, RATE),),
    batch_size=32,
    momentum=0.9,
    weight_decay=1e-4,
    lasso=0.0,
    threshold=1e-5,
    seed=3,
)
RUN: dict[str, Any] = {"recipe": "blobs", "seed": 3}
IMAGE = Image("L", 6, 6, (0.5,), (0.25,))


class Net(nn.Module):
    """With dropout, so that it draws random numbers of its own; `head` stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(64, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.conv(x).relu().flatten(1))
        logits: Tensor = self.head(self.fc(x).relu())
        return logits


def network() -> Net:
    torch.manual_seed(0)
    model = Net()
    factorize_(model, keep=["head"])
    return model


def pictures(n: int, seed: int) -> Pictures:
    """Return pictures whose label is the third that is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    pixels = torch.randint(0, 120, (n, 6, 6, 1), generator=generator)
    for i, label in enumerate(labels.tolist()):
        pixels[i, 2 * label : 2 * label + 2] += 60
    return Pictures(pixels.to(torch.uint8), labels, IMAGE)


@pytest.fixture(scope="module")
def data() -> Data:
    return Data(pictures(300, 0), pictures(100, 1), pictures(100, 2), "blobs", "0")


def phases(ordered: int, nested: int = 0, rate: float = RATE) -> tuple[Phase, ...]:
    return (Phase("ordered", ordered, rate), Phase("nested", nested, rate))


CHAIN: Chain = [(1, 2), (2, 6), (4, 12)]
OFF = Progress(disable=True)


def train(
    model: nn.Module,
    data: Data,
    root: Path,
    hyper: HyperParameters = HYPER,
    progress: Progress | None = None,
    run: dict[str, Any] = RUN,
) -> Path:
    """Train and return the last checkpoint."""

    def find() -> Chain:
        ranks = [layer.rank for layer in low_rank_layers(model).values()]
        return [tuple(map(min, point, ranks)) for point in CHAIN]

    assert train_(model, data, hyper, find, root, run, progress or OFF) == find()
    last = checkpoint.latest(root)
    assert last is not None
    return last


def test_training_learns_at_full_rank_and_below(data: Data, tmp_path: Path) -> None:
    model = network()

    train(model, data, tmp_path)

    assert evaluate(model, data.validation).accuracy > 0.95
    assert evaluate(model, data.validation, {"fc": 3}).accuracy > 0.9
    assert evaluate(model, data.validation, {"fc": 0}).accuracy < 0.6


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    data: Data, tmp_path: Path
) -> None:
    first, again, other = network(), network(), network()

    train(first, data, tmp_path / "a")
    torch.rand(7)  # the state of the global generator must not matter
    train(again, data, tmp_path / "b")
    train(other, data, tmp_path / "c", replace(HYPER, seed=4))

    assert same(first, again)
    assert not same(first, other)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


SHRINKING = replace(HYPER, lasso=2e-2, threshold=0.1, phases=phases(6))


def test_a_resumed_run_ends_with_the_bits_and_ranks_of_one_that_never_stopped(
    data: Data, tmp_path: Path
) -> None:
    whole, stopped, resumed = network(), network(), network()
    train(whole, data, tmp_path / "whole", SHRINKING)

    with pytest.raises(KeyboardInterrupt):
        train(stopped, data, tmp_path / "cut", SHRINKING, Stops(43))
    left = checkpoint.latest(tmp_path / "cut")
    assert left is not None
    ranks = checkpoint.read_state(left).ranks
    train(resumed, data, tmp_path / "cut", SHRINKING)

    assert left.name == "epoch-0004"
    assert ranks["fc"] < 12, "nothing shrank before the interruption, so ranks were not tried"
    assert same(whole, resumed)


def test_a_run_whose_lasso_is_a_whole_number_is_resumed(data: Data, tmp_path: Path) -> None:
    hyper = replace(HYPER, lasso=0, phases=phases(1))
    path = train(network(), data, tmp_path, hyper)

    assert train(network(), data, tmp_path, hyper) == path


CONSOLIDATING = replace(HYPER, phases=phases(2, 2))


def test_consolidation_raises_the_points_and_keeps_the_whole(data: Data, tmp_path: Path) -> None:
    ordered, consolidated = network(), network()
    train(ordered, data, tmp_path / "a", replace(HYPER, phases=phases(2)))
    train(consolidated, data, tmp_path / "b", replace(HYPER, phases=phases(2, 8)))

    cheap = {"conv": 1, "fc": 2}
    before = evaluate(ordered, data.validation, cheap)
    after = evaluate(consolidated, data.validation, cheap)
    assert after.loss < before.loss / 2
    assert after.accuracy > 0.9
    whole = evaluate(consolidated, data.validation).accuracy
    assert whole >= evaluate(ordered, data.validation).accuracy - 0.01


@pytest.mark.parametrize("stop", [15, 20, 21, 35])
def test_a_run_stopped_in_either_phase_ends_with_the_same_bits(
    data: Data, tmp_path: Path, stop: int
) -> None:
    whole, stopped, resumed = network(), network(), network()
    train(whole, data, tmp_path / "whole", CONSOLIDATING)

    with pytest.raises(KeyboardInterrupt):
        train(stopped, data, tmp_path / "cut", CONSOLIDATING, Stops(stop))
    train(resumed, data, tmp_path / "cut", CONSOLIDATING)

    assert same(whole, resumed)


TAUGHT = replace(
    HYPER,
    phases=(
        Phase("dense", 2, RATE),
        Phase("dense", 1, RATE),
        Phase("ordered", 1, RATE),
        Phase("nested", 2, RATE, taught=True),
    ),
    keep=("head",),
)
UNTAUGHT = replace(TAUGHT, phases=(*TAUGHT.phases[:3], Phase("nested", 2, RATE)))


def untrained() -> Net:
    torch.manual_seed(0)
    return Net()


def test_the_network_at_the_end_of_each_dense_phase_teaches_the_points(
    data: Data, tmp_path: Path
) -> None:
    taught, alone, dense = untrained(), untrained(), untrained()
    train(taught, data, tmp_path / "a", TAUGHT)
    train(alone, data, tmp_path / "b", UNTAUGHT)
    last = train(untrained(), data, tmp_path / "c", replace(TAUGHT, phases=TAUGHT.phases[:1]))
    checkpoint.restore_(last, dense, None, RUN)

    kept = {f.name: f for f in (tmp_path / "a").glob("*.safetensors")}
    assert sorted(kept) == ["dense-0002.safetensors", "dense-0003.safetensors"]
    assert not list((tmp_path / "b").glob("*.safetensors"))
    teacher = untrained()
    checkpoint.load_weights_(tmp_path / "a", "dense-0002", teacher)
    assert same(teacher, dense)
    assert not same(taught, alone)
    assert evaluate(taught, data.validation, {"conv": 1, "fc": 2}).accuracy > 0.9


AVERAGED = replace(
    TAUGHT,
    phases=(
        *TAUGHT.phases[1:3],
        replace(TAUGHT.phases[3], group=1),
        Phase("nested", 1, RATE, group=1),
        Phase("nested", 1, 0.0, group=1),  # it ends with what it began from
        Phase("nested", 1, RATE, group=2),
        Phase("nested", 1, RATE, group=2),
    ),
)


@pytest.mark.parametrize("stop", [15, 25, 35, 45, 55, 65, 75])
def test_a_run_that_keeps_networks_and_was_stopped_ends_with_the_same_bits(
    data: Data, tmp_path: Path, stop: int
) -> None:
    whole, resumed = untrained(), untrained()
    train(whole, data, tmp_path / "whole", AVERAGED)

    with pytest.raises(KeyboardInterrupt):
        train(untrained(), data, tmp_path / "cut", AVERAGED, Stops(stop))
    train(resumed, data, tmp_path / "cut", AVERAGED)

    assert same(whole, resumed)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"junk", "damaged"), (b"other", "does not fit the network")],
)
def test_a_teacher_that_is_gone_or_damaged_is_named(
    data: Data, tmp_path: Path, content: bytes | None, message: str
) -> None:
    none = Phase("nested", 0, RATE, taught=True)
    train(untrained(), data, tmp_path, replace(TAUGHT, phases=(*TAUGHT.phases[:3], none)))
    teacher = tmp_path / "dense-0003.safetensors"
    teacher.unlink()
    if content == b"other":
        checkpoint.save_weights(tmp_path, "dense-0003", nn.Linear(2, 2))
    elif content:
        teacher.write_bytes(content)

    with pytest.raises(CheckpointError, match=rf"dense-0003\.safetensors: {message}"):
        train(untrained(), data, tmp_path, TAUGHT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"phases": (Phase("nested", 1, RATE, taught=True),)},
            "taught needs a dense phase: its network is the teacher",
        ),
        (
            {"phases": (Phase("dense", 1, RATE, taught=True),)},
            "taught is for nested phases: they train points",
        ),
        (
            {"phases": (Phase("nested", 1, RATE, group=1), Phase("nested", 1, RATE))},
            "group 1 needs two phases or more, one after another",
        ),
        (
            {"phases": tuple(Phase("nested", 1, RATE, group=g) for g in (1, 2, 2, 1))},
            "group 1 needs two phases or more, one after another",
        ),
        (
            {"phases": (Phase("dense", 1, RATE, group=3),) * 2},
            "group 3 is of dense phases, not of nested ones",
        ),
        (
            {"phases": phases(0, 1), "target": Target("macs", 0.5)},
            "a target needs one ordered phase",
        ),
        ({"precision": "bf16"}, "precision is one of float32, bfloat16, not 'bf16'"),
        ({"sampling": "pair"}, "sampling is one of pairs, layers, ratio, not 'pair'"),
        ({"batch_size": 0}, "batch_size is 0, not a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5, not a whole number of at least 1"),
        ({"lasso": -1e-6}, "lasso is -1e-06, not a number of at least 0"),
        ({"threshold": math.nan}, "threshold is nan, not a number of at least 0"),
        ({"weight_decay": math.inf}, "weight_decay is inf, not a number of at least 0"),
        ({"momentum": 1.0}, "momentum is 1.0, not in 0..1, 1 left out"),
        ({"warmup": 1.0}, "warmup is 1.0, not in 0..1, 1 left out"),
    ],
)
def test_hyper_parameters_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(HYPER, **changes)


def test_a_phase_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is one of dense, ordered, nested, not 'orderd'"):
        Phase("orderd", 1, RATE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 epochs or more, not -1"):
        Phase("dense", -1, RATE)
    with pytest.raises(ValueError, match=r"learning_rate is -0.1, not a number of at least 0"):
        Phase("dense", 1, -0.1)


def test_phases_of_a_group_begin_from_one_network_and_end_in_their_mean(
    data: Data, tmp_path: Path
) -> None:
    model = untrained()

    train(model, data, tmp_path, AVERAGED)

    names = ["nested-0004", "nested-0005", "nested-0006", "nested-0007", "nested-0008"]
    starts = ["start-0002", "start-0006"]
    assert sorted(f.stem for f in tmp_path.glob("*.safetensors")) == ["dense-0001", *names, *starts]
    kept = {}
    for name in (*names, *starts):
        network = copy.deepcopy(model)
        checkpoint.load_weights_(tmp_path, name, network)
        kept[name] = dict(network.named_parameters())
    for name, parameter in model.named_parameters():
        ends = [kept[end][name] for end in names]
        assert torch.equal(ends[2], kept["start-0002"][name])
        torch.testing.assert_close(kept["start-0006"][name], sum(ends[:3]) / 3)
        torch.testing.assert_close(parameter, sum(ends[3:], kept["start-0006"][name]) / 3)
    for one, other in pairwise(names):
        assert any(not torch.equal(a, kept[other][name]) for name, a in kept[one].items())


def test_the_mean_is_normalised_by_pictures_of_its_own(data: Data, tmp_path: Path) -> None:
    hyper = replace(AVERAGED, phases=(Phase("nested", 1, RATE, group=1),) * 2)
    torch.manual_seed(0)
    first, last = (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
        for _ in range(2)
    )

    averaging.end_(first, data, tmp_path, hyper, 1)
    assert torch.equal(first.state_dict()["1.running_mean"], torch.zeros(4))
    averaging.end_(last, data, tmp_path, hyper, 2)

    expected = recalibrate(last, {}, data.train)
    assert torch.equal(last.state_dict()["1.running_mean"], expected["1.running_mean"])
    assert not torch.equal(last.state_dict()["1.running_var"], torch.ones(4))


def test_one_picture_more_than_batches_hold_can_be_trained_on(tmp_path: Path) -> None:
    data = Data(pictures(65, 0), pictures(33, 1), pictures(33, 2), "blobs", "0")
    norm = nn.BatchNorm1d(36)
    model = nn.Sequential(nn.Flatten(), norm, nn.Linear(36, 3))

    train(model, data, tmp_path)

    assert norm.num_batches_tracked == 3 * HYPER.epochs


def test_a_finished_run_is_not_trained_again(data: Data, tmp_path: Path) -> None:
    first, again = network(), network()
    path = train(first, data, tmp_path)

    assert train(again, data, tmp_path) == path
    assert same(first, again)


def test_shrinking_frees_ranks_and_says_so(data: Data, tmp_path: Path) -> None:
    model = network()

    path = train(model, data, tmp_path, SHRINKING)

    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    assert ranks["fc"] < 12
    assert checkpoint.read_state(path).ranks == ranks
    assert evaluate(model, data.validation).accuracy > 0.9


def test_a_proximal_step_makes_exact_zeros_that_are_removed(data: Data, tmp_path: Path) -> None:
    model = network()

    path = train(model, data, tmp_path, replace(SHRINKING, threshold=0.0, proximal=True))

    ranks = checkpoint.read_state(path).ranks
    assert ranks["fc"] < 12
    assert ranks == {name: layer.rank for name, layer in low_rank_layers(model).items()}
    assert evaluate(model, data.validation).accuracy > 0.9


@pytest.mark.parametrize(
    "changes", [{"threshold": 1e9}, {"lasso": 100.0, "threshold": 0.1, "proximal": True}]
)
def test_a_network_without_a_rank_left_is_not_saved_and_says_why(
    data: Data, tmp_path: Path, changes: dict[str, Any]
) -> None:
    hyper = replace(HYPER, phases=phases(2), **changes)

    with pytest.raises(NothingLeft, match=r"after epoch 1: a lasso of .* threshold of .*: none"):
        train(network(), data, tmp_path, hyper)
    assert checkpoint.latest(tmp_path) is None


def test_a_directory_that_another_process_trains_in_is_left_to_it(
    data: Data, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    program = (
        "import sys, pathlib; from maestro_core.locking import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(CheckpointError, match="another training runs there"):
            train(network(), data, root)
        other.kill()

    assert train(network(), data, root).name == f"epoch-{HYPER.epochs:04}"


def test_a_directory_is_kept_whoever_tries_it_and_by_whatever_name(tmp_path: Path) -> None:
    root, link = tmp_path / "root", tmp_path / "link"
    link.symlink_to(root)
    program = (
        "import sys, pathlib; from maestro_core.checkpoint import kept_in\n"
        "with kept_in(pathlib.Path(sys.argv[1])): pass"
    )

    with checkpoint.kept_in(root):
        for path in (root, link):
            with (
                pytest.raises(CheckpointError, match="another training runs there"),
                checkpoint.kept_in(path),
            ):
                pass
            other = subprocess.run(
                [sys.executable, "-c", program, str(path)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert "another training runs there" in other.stderr
    with checkpoint.kept_in(link):
        pass


def test_a_lock_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "root.lock").mkdir()

    with (
        pytest.raises(CheckpointError, match=r"root\.lock: cannot be written: Is a directory"),
        checkpoint.kept_in(tmp_path / "root"),
    ):
        pass


def test_only_the_last_checkpoint_is_kept_and_nothing_half_written(
    data: Data, tmp_path: Path
) -> None:
    path = train(network(), data, tmp_path)

    assert [entry.name for entry in tmp_path.iterdir()] == ["epoch-0004"]
    assert sorted(entry.name for entry in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_the_checkpoint_of_the_most_epochs_is_the_last(tmp_path: Path) -> None:
    for name in ("epoch-0012", "epoch-9999", "epoch-10000"):
        (tmp_path / name).mkdir()

    assert checkpoint.latest(tmp_path) == tmp_path / "epoch-10000"


def test_a_copy_is_neither_resumed_from_nor_removed(data: Data, tmp_path: Path) -> None:
    first = train(network(), data, tmp_path, replace(HYPER, phases=phases(1)))
    copies = [tmp_path / name for name in ("epoch-0001-keep", "epoch-keep", "epoch-")]
    for path in copies:
        shutil.copytree(first, path)

    assert checkpoint.latest(tmp_path) == first
    last = train(network(), data, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*copies, last])


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(
    data: Data, tmp_path: Path
) -> None:
    path = train(network(), data, tmp_path, replace(HYPER, phases=phases(1)))
    wild = replace(HYPER, phases=phases(3, rate=1e9))

    with pytest.raises(Diverged, match=r"nan at epoch 2, step \d+ of 10; last good .*epoch-0001"):
        train(network(), data, tmp_path, wild)
    assert checkpoint.latest(tmp_path) == path


def test_a_network_spoilt_by_the_last_step_of_an_epoch_is_not_saved(
    data: Data, tmp_path: Path
) -> None:
    wild = replace(HYPER, batch_size=len(data.train), phases=phases(4, rate=1e30))

    with pytest.raises(Diverged, match=r"validation loss is nan after epoch 1; last .*: none"):
        train(network(), data, tmp_path, wild)
    assert checkpoint.latest(tmp_path) is None
    assert issubclass(Diverged, ValueError), "the program shows these in one line"


@pytest.mark.parametrize("run", [{"recipe": "other", "seed": 3}, {"recipe": "blobs", "seed": 4}])
def test_a_checkpoint_of_another_run_is_refused(
    data: Data, tmp_path: Path, run: dict[str, Any]
) -> None:
    train(network(), data, tmp_path)

    with pytest.raises(CheckpointError, match=r"run\.(recipe|seed) is .* but this run has"):
        train(network(), data, tmp_path, run=run)


def test_another_search_is_refused_only_when_the_chain_is_found(data: Data, tmp_path: Path) -> None:
    first, other = ({**RUN, "search": {"points": points}} for points in (4, 5))
    train(network(), data, tmp_path, replace(HYPER, phases=phases(1)), run=first)

    path = train(network(), data, tmp_path, replace(HYPER, phases=phases(1, 1)), run=other)

    assert checkpoint.read_state(path).run == other
    with pytest.raises(CheckpointError, match=r"run\.search is .*5.* but this run has .*4"):
        train(network(), data, tmp_path, replace(HYPER, phases=phases(1, 1)), run=first)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_named(data: Data, tmp_path: Path, name: str, damage: str) -> None:
    file = train(network(), data, tmp_path) / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:40])

    why = "No such file" if damage == "missing" else "damaged|not a training state"
    with pytest.raises(CheckpointError, match=rf"^[^:]*/{name}: ({why})"):
        train(network(), data, tmp_path)


def test_a_state_with_wrong_ranks_is_named(data: Data, tmp_path: Path) -> None:
    path = train(network(), data, tmp_path) / "state.json"
    state = json.loads(path.read_text())
    for ranks in (
        {"conv": 4},
        {"conv": 4, "fc": -1},
        {"conv": 4, "fc": 99},
        {"conv": 4, "fc": "x"},
    ):
        path.write_text(json.dumps({**state, "ranks": ranks}))

        with pytest.raises(CheckpointError, match=r"state\.json|ranks 0\.\.12, not 99"):
            train(network(), data, tmp_path)


def test_a_disk_that_fails_leaves_the_earlier_checkpoint(data: Data, tmp_path: Path) -> None:
    model = network()
    path = train(model, data, tmp_path / "root", replace(HYPER, phases=phases(1)))
    blocked = tmp_path / "root" / ".epoch-0002"
    blocked.write_text("a file where the new directory must go")

    state = checkpoint.State(2, {}, RUN, [])
    with pytest.raises(CheckpointError, match="epoch-0002: cannot be written: File exists"):
        checkpoint.save(tmp_path / "root", model, torch.optim.SGD(model.parameters()), state)
    assert checkpoint.latest(tmp_path / "root") == path
    shutil.rmtree(tmp_path / "root")


def test_a_place_that_takes_no_checkpoint_is_named_before_the_first_step(
    data: Data, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(CheckpointError, match="file/root: cannot be written: Not a directory"):
        train(network(), data, tmp_path / "file" / "root", progress=Stops(1))


def test_the_rate_falls_from_the_first_to_nearly_nothing() -> None:
    rates = [learning_rate(Phase("ordered", 4, RATE), 0.0, epoch / 10) for epoch in range(40)]

    assert rates[0] == RATE
    assert rates[20] == pytest.approx(RATE / 2)
    assert 0 < rates[-1] < RATE * 3e-3
    assert rates == sorted(rates, reverse=True)


def test_the_rate_falls_by_10_at_each_milestone_instead() -> None:
    phase = Phase("ordered", 300, 0.01, milestones=(0.5, 0.75))

    rates = [learning_rate(phase, 0.0, epoch) for epoch in (0, 149.9, 150, 224.9, 225, 299.9)]

    assert rates == pytest.approx([0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])


def test_the_rate_first_rises_where_there_is_a_warm_up() -> None:
    rates = [learning_rate(Phase("dense", 4, RATE), 0.25, epoch / 10) for epoch in range(40)]

    assert rates[0] == 0
    assert rates[5] == pytest.approx(RATE / 2)
    assert rates[10] == RATE == max(rates)
    assert rates[:10] == sorted(rates[:10])


def test_a_dense_phase_trains_the_network_before_it_is_factorised(
    data: Data, tmp_path: Path
) -> None:
    hyper = replace(HYPER, phases=(Phase("dense", 3, RATE),), keep=("head",))
    torch.manual_seed(0)
    model = Net()
    before = model.fc.weight.detach().clone()

    train(model, data, tmp_path, hyper)

    fc = low_rank_layers(model)["fc"]
    assert isinstance(model.get_submodule("head"), nn.Linear)
    assert (fc.up.t() @ fc.down - before).abs().max() > 0.01, "it was factorised before it learnt"
    assert evaluate(model, data.validation).accuracy > 0.9
    assert checkpoint.read_state(tmp_path / "epoch-0003").ranks == {}


@pytest.mark.parametrize("stop", [5, 10, 11, 25, 35])
def test_a_run_stopped_before_or_after_the_factorisation_ends_with_the_same_bits(
    data: Data, tmp_path: Path, stop: int
) -> None:
    kinds: tuple[Kind, ...] = ("dense", "ordered", "nested", "nested")
    hyper = replace(HYPER, phases=tuple(Phase(k, 1, RATE) for k in kinds), keep=("head",))

    def fresh() -> Net:
        torch.manual_seed(0)
        return Net()

    whole, stopped, resumed = fresh(), fresh(), fresh()
    train(whole, data, tmp_path / "whole", hyper)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, data, tmp_path / "cut", hyper, Stops(stop))
    train(resumed, data, tmp_path / "cut", hyper)

    assert same(whole, resumed)


def plain_and_whitened(data: Data, root: Path, hyper: HyperParameters) -> list[Net]:
    """Return a network trained so, factorised by its weights, and by its activations."""
    trained = []
    for whitened in (False, True):
        torch.manual_seed(0)
        trained.append(Net())
        train(trained[-1], data, root / str(whitened), replace(hyper, whitened=whitened))
    return trained


def test_a_trained_network_can_be_factorised_by_its_activations(data: Data, tmp_path: Path) -> None:
    hyper = replace(HYPER, phases=(Phase("dense", 3, RATE),), keep=("head",))
    plain, whitened = plain_and_whitened(data, tmp_path, hyper)

    assert not same(plain, whitened)
    whiten_(plain, [data.train.batch(slice(None))[0]])
    for ours, theirs in zip(whitened.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_network_that_comes_trained_is_factorised_by_its_activations_too(
    data: Data, tmp_path: Path
) -> None:
    hyper = replace(HYPER, phases=(Phase("nested", 1, 0.0),), keep=("head",))
    plain, whitened = plain_and_whitened(data, tmp_path, hyper)

    assert not same(plain, whitened)


@pytest.mark.parametrize("whitened", [False, True])
def test_a_layer_that_begins_at_zero_learns(data: Data, tmp_path: Path, whitened: bool) -> None:
    torch.manual_seed(0)
    model = Net()
    nn.init.zeros_(model.head.weight)

    hyper = replace(HYPER, phases=phases(8), whitened=whitened)
    train_(model, data, hyper, lambda: [(4, 12, 3)], tmp_path, {}, OFF)

    assert evaluate(model, data.validation).accuracy > 0.9


@pytest.mark.parametrize("sampling", ["layers", "ratio"])
def test_layers_may_be_cut_in_other_ways(data: Data, tmp_path: Path, sampling: Sampling) -> None:
    model, paper = network(), network()

    train(model, data, tmp_path / "other", replace(HYPER, sampling=sampling))
    train(paper, data, tmp_path / "paper")

    assert not same(model, paper)
    assert evaluate(model, data.validation, {"conv": 2, "fc": 6}).accuracy > 0.9


def test_ranks_above_the_chain_are_gone_before_its_points_are_trained(
    data: Data, tmp_path: Path
) -> None:
    model = network()
    short: Chain = [(1, 2), (2, 6)]

    train_(
        model,
        data,
        CONSOLIDATING,
        lambda: short,
        tmp_path,
        RUN,
        Progress(disable=True),
    )

    assert [layer.rank for layer in low_rank_layers(model).values()] == [2, 6]


def test_normalisation_can_learn_at_a_rate_of_its_own(data: Data, tmp_path: Path) -> None:
    class Normalised(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    def learnt(times: float) -> dict[str, float]:
        torch.manual_seed(0)
        model = Normalised()
        dense = (Phase("dense", 1, RATE),)
        hyper = replace(HYPER, phases=dense, keep=("head",), normalisation_rate=times)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, data, tmp_path / str(times), hyper)
        after = dict(model.named_parameters())
        names = ("norm.weight", "norm.bias", "head.bias")
        return {name: float((after[name].detach() - before[name]).abs().max()) for name in names}

    slow, alike = learnt(1e-4), learnt(1.0)

    assert all(0 < slow[name] < 0.01 * alike[name] for name in ("norm.weight", "norm.bias"))
    assert slow["head.bias"] > 0.1 * alike["head.bias"]


def test_a_rate_of_normalisation_that_learns_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="normalisation_rate is 0, not above 0"):
        replace(HYPER, normalisation_rate=0)


def test_phases_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="dense, ordered, nested, not as nested, dense"):
        replace(HYPER, phases=(Phase("nested", 1, RATE), Phase("dense", 1, RATE)))
