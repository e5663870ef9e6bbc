"""How a network is trained: its phases, their rates, and what else a recipe sets. No loop."""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from maestro_core.sampling import Sampling
from maestro_core.target import Target

Kind = Literal["dense", "ordered", "nested"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Phase:
    """Some epochs of one kind; the rate rises to `learning_rate` and falls to 0 along a cosine.

    `dense`: the network before it is factorised. `ordered`: one layer cut at random in each step
    (Maestro, ICML 2024). `nested`: the points of the chain together (consolidation.py).
    With `milestones`, rising shares of the epochs, the rate is divided by 10 at each instead.
    `distortion` is how far pictures are turned, zoomed and recoloured (data.py), beyond what the
    recipe changes of them in all phases; 1 is a usual strength. A nested phase that is `taught`
    learns no labels but what the dense networks answer that the dense phases ended with
    (teachers.py). Nested phases of one `group` above 0 all begin from the network that the first of
    them began with, and what the last ends with is a mean (averaging.py).
    """

    kind: Kind
    epochs: int
    learning_rate: float
    milestones: tuple[float, ...] = ()
    distortion: float = 0.0
    taught: bool = False
    group: int = 0

    def __post_init__(self) -> None:
        _check_one_of("a phase's kind", self.kind, get_args(Kind))
        if self.epochs < 0:
            raise ValueError(f"a phase has 0 epochs or more, not {self.epochs}")
        _check_least("learning_rate", self.learning_rate)
        _check_least("distortion", self.distortion)


@dataclass(frozen=True, slots=True)
class Moments:
    """What Adam (Kingma and Ba, 2015) remembers of gradients: decay of both means, and ε."""

    betas: tuple[float, float]
    epsilon: float


@dataclass(frozen=True, slots=True)
class HyperParameters:
    """How a network is trained: in phases, which come in the order dense, ordered, nested.

    The optimiser is SGD, or Adam where there is `adam`; then a proximal step follows Adam's at its
    rate alone, as decoupled weight decay does, and `momentum` is 0.

    `keep` names layers to leave dense. `lasso` weighs the group lasso, `threshold` is the
    importance at or below which a rank is removed (in the paper λ_gl and ε_ps); with `proximal` the
    lasso is not in the loss but in a step after the optimiser's (proximal.py). `warmup` is the
    share of a phase in which its rate rises. `precision` is that of forward and backward, where the
    host computes in it, else float32; parameters are float32 always. `sampling` is of the ordered
    phase (sampling.py). With `whitened` the network is factorised by its activations, which is for
    one that is trained by then (whitening.py).
    With a `target` the ordered phase ends at that size, whatever `lasso` (target.py).
    Scales and shifts of batch normalisation learn `normalisation_rate` times as fast as the rest.
    """

    phases: tuple[Phase, ...]
    batch_size: int
    momentum: float
    weight_decay: float
    lasso: float
    threshold: float
    seed: int
    keep: tuple[str, ...] = ()
    nesterov: bool = False
    warmup: float = 0.0
    label_smoothing: float = 0.0
    precision: Precision = "float32"
    sampling: Sampling = "pairs"
    proximal: bool = False
    target: Target | None = None
    whitened: bool = False
    normalisation_rate: float = 1.0
    adam: Moments | None = None

    def __post_init__(self) -> None:
        kinds = [phase.kind for phase in self.phases]
        if kinds != sorted(kinds, key=("dense", "ordered", "nested").index):
            raise ValueError(f"phases come as dense, ordered, nested, not as {', '.join(kinds)}")
        _check_one_of("precision", self.precision, get_args(Precision))
        _check_one_of("sampling", self.sampling, get_args(Sampling))
        if not (isinstance(self.batch_size, int) and self.batch_size >= 1):
            raise ValueError(f"batch_size is {self.batch_size}, not a whole number of at least 1")
        for name in ("weight_decay", "lasso", "threshold"):
            _check_least(name, getattr(self, name))
        for name in ("momentum", "warmup", "label_smoothing"):
            _check_share(name, getattr(self, name))
        shrinking = [phase for phase in self.phases if phase.kind == "ordered"]
        if self.target and not (len(shrinking) == 1 and shrinking[0].epochs):
            raise ValueError("a target needs one ordered phase, in which the network shrinks")
        if any(phase.taught and phase.kind != "nested" for phase in self.phases):
            raise ValueError("taught is for nested phases: they train points")
        if self.taught and "dense" not in kinds:
            raise ValueError("taught needs a dense phase: its network is the teacher")
        groups = [phase.group for phase in self.phases]
        for group in {group for group in groups if group}:
            first, count = groups.index(group), groups.count(group)
            if count < 2 or groups[first : first + count] != [group] * count:
                raise ValueError(f"group {group} needs two phases or more, one after another")
            if kinds[first] != "nested":
                raise ValueError(f"group {group} is of {kinds[first]} phases, not of nested ones")
        if not self.normalisation_rate > 0:
            raise ValueError(f"normalisation_rate is {self.normalisation_rate}, not above 0")
        if self.adam and (self.momentum or self.nesterov):
            raise ValueError(f"momentum is SGD's: with adam it is 0, not {self.momentum}")

    def at(self, epoch: int) -> tuple[Phase, int]:
        """Return the phase of `epoch`, and how many of its epochs came before.

        Raises:
            ValueError: the phases end before.
        """
        before = 0
        for phase in self.phases:
            if epoch < before + phase.epochs:
                return phase, epoch - before
            before += phase.epochs
        raise ValueError(f"there are {before} epochs, no epoch {epoch + 1}")

    def ends(self, kind: Kind) -> list[int]:
        """Return how many epochs are over at the end of each phase of a kind."""
        ends = accumulate(phase.epochs for phase in self.phases)
        return [end for phase, end in zip(self.phases, ends, strict=True) if phase.kind == kind]

    def group(self, number: int) -> tuple[int, list[int]]:
        """Return how many epochs are over when a group begins, and at the end of each phase."""
        ends = list(accumulate((phase.epochs for phase in self.phases), initial=0))
        phases = [i for i, phase in enumerate(self.phases) if phase.group == number]
        return ends[phases[0]], [ends[i + 1] for i in phases]

    @property
    def taught(self) -> bool:
        """Return whether a phase needs the dense networks as teachers."""
        return any(phase.taught for phase in self.phases)

    @property
    def epochs(self) -> int:
        """Return how many epochs there are in all phases."""
        return sum(phase.epochs for phase in self.phases)


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is one of {', '.join(known)}, not '{value}'")


def _check_least(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}, not a number of at least 0")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}, not in 0..1, 1 left out")


def learning_rate(phase: Phase, warmup: float, epoch: float) -> float:
    """Return the rate at `epoch` of the phase, 0..phase.epochs.

    It rises in a line, then falls in steps of 10, or along half a cosine (Loshchilov and Hutter,
    SGDR, 2017).
    """
    done = epoch / phase.epochs
    if done < warmup:
        return phase.learning_rate * done / warmup
    if phase.milestones:
        passed = sum(done >= milestone for milestone in phase.milestones)
        return float(phase.learning_rate * 0.1**passed)
    fallen = (done - warmup) / (1 - warmup)
    return phase.learning_rate * 0.5 * (1 + math.cos(math.pi * fallen))
