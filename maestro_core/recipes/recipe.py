"""What a recipe says: everything that decides a trained artifact, but for the data file."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from maestro_core.artifact import NAME, Image
from maestro_core.data import NO_AUGMENTATION, Augmentation, Pictures
from maestro_core.folders import Folders
from maestro_core.schedule import HyperParameters
from maestro_core.search import SearchParameters


@dataclass(frozen=True, slots=True)
class Recipe:
    """A network, the pictures it reads, and how it is trained and searched.

    `validation` pictures leave the training set to choose the points. `data_set` and `source` say
    what the data is, and whose. The first `kept_samples` of the test pictures go into the artifact,
    for hosts that look for points of their own; of class folders they are a draw (folders.py).
    `prepare` sets what a network takes from its training pictures before the first step. With
    `folders` the data is a folder of class folders, which name the labels; else an .npz file, and
    `labels` are given.
    """

    name: str
    summary: str
    network: Callable[[], nn.Module]
    data_set: str
    source: str
    image: Image
    labels: tuple[str, ...]
    validation: int
    kept_samples: int
    training: HyperParameters
    search: SearchParameters
    augmentation: Augmentation = NO_AUGMENTATION
    prepare: Callable[[nn.Module, Pictures], None] | None = None
    folders: Folders | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.name):
            raise ValueError(f"recipe '{self.name}': a name is {NAME}, as artifacts have it")
        if bool(self.labels) == bool(self.folders):
            raise ValueError(f"recipe '{self.name}': give labels, or folders that name them")
        for label in self.labels:
            if not isinstance(label, str):
                raise ValueError(f"recipe '{self.name}': a label is a string, not {label!r}")
        if self.kept_samples < 0:
            raise ValueError(f"recipe '{self.name}': kept_samples is {self.kept_samples}, under 0")

    def identity(self, data_sha256: str) -> dict[str, Any]:
        """Return, as plain JSON, what a checkpoint must agree on to be resumed.

        On `search` once it has found the chain.
        """
        return {
            "recipe": self.name,
            "data_sha256": data_sha256,
            "image": asdict(self.image),
            "validation": self.validation,
            "augmentation": asdict(self.augmentation),
            **({"folders": asdict(self.folders)} if self.folders else {}),
            **asdict(self.training),
            "search": asdict(self.search),
        }


@dataclass(frozen=True, slots=True)
class TextRecipe:
    """A network from sentence to sentence, the text it reads, and how it is trained and searched.

    `languages` are source and target, `splits` the names of training, validation and test files
    (sentences.py). `vocabulary` is how many tokens there are; the network has as many.
    """

    name: str
    summary: str
    network: Callable[[], nn.Module]
    data_set: str
    source: str
    languages: tuple[str, str]
    splits: tuple[str, str, str]
    vocabulary: int
    training: HyperParameters
    search: SearchParameters

    def identity(self, data_sha256: str) -> dict[str, Any]:
        """Return, as plain JSON, what a checkpoint must agree on to resume, as `Recipe` does."""
        return {
            "recipe": self.name,
            "data_sha256": data_sha256,
            "languages": self.languages,
            "splits": self.splits,
            "vocabulary": self.vocabulary,
            **asdict(self.training),
            "search": asdict(self.search),
        }
