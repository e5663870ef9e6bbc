"""What an artifact may hold so that a host finds points of its own: samples, and error tables.

`eval.npz` has labelled samples that the network was not trained on, `errors.json` the loss with
one layer cut alone, for each layer and some of its ranks. No torch.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestro_core.artifact import Artifact, ArtifactError
from maestro_core.frontier import RankTable

EVAL = "eval.npz"
ERRORS = "errors.json"


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Inputs as the network takes them, (n, *input shape) float32, and labels (n,) int64."""

    x: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class ErrorTable:
    """The losses of the whole network when one layer alone is cut to these rising ranks."""

    ranks: tuple[int, ...]
    errors: tuple[float, ...]


def contents(
    x: NDArray[np.float32],
    labels: NDArray[np.int64],
    names: Sequence[str],
    tables: Sequence[RankTable],
) -> dict[str, bytes]:
    """Return both files, path -> bytes; `names` and `tables` are those of the layers, in order."""
    file = io.BytesIO()
    np.savez_compressed(file, x=x, labels=labels)
    errors = {
        name: {"ranks": table.ranks, "errors": table.errors}
        for name, table in zip(names, tables, strict=True)
    }
    return {EVAL: file.getvalue(), ERRORS: json.dumps(errors, indent=1).encode() + b"\n"}


def is_searchable(artifact: Artifact) -> bool:
    """Return whether an artifact holds both files."""
    return {EVAL, ERRORS} <= artifact.manifest.files.keys()


def read_samples(artifact: Artifact) -> Samples:
    """Return the labelled samples of an artifact.

    Raises:
        ArtifactError: there are none, or they are not what the model takes.
    """
    path = artifact.path / _present(artifact, EVAL)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            x, labels = arrays["x"], arrays["labels"]
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path}: not samples: {error}") from None
    shape = artifact.manifest.input.shape[1:]
    if x.dtype != np.float32 or x.shape[1:] != shape or not len(x):
        wanted = ["n", *shape]
        raise ArtifactError(f"{path}: x is {x.dtype} {list(x.shape)}; it must be float32 {wanted}")
    if labels.shape != x.shape[:1] or labels.dtype.kind not in "iu":
        raise ArtifactError(
            f"{path}: labels is {labels.dtype} {list(labels.shape)}; it must be integers [{len(x)}]"
        )
    return Samples(x, labels.astype(np.int64))


def read_tables(artifact: Artifact) -> list[ErrorTable]:
    """Return the error table of each layer, in the order of the manifest.

    Raises:
        ArtifactError: there are none, or one does not fit its layer.
    """
    path = artifact.path / _present(artifact, ERRORS)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not JSON: {error}") from None
    tables = []
    for layer in artifact.manifest.layers:
        try:
            table = _table(data[layer.name])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: layer '{layer.name}': {error!r}") from None
        if table.ranks[-1] != layer.max_rank or table.ranks[0] < 0:
            raise ArtifactError(
                f"{path}: layer '{layer.name}': ranks must end at {layer.max_rank}, "
                f"not be {table.ranks[0]}..{table.ranks[-1]}"
            )
        tables.append(table)
    return tables


def _table(entry: Any) -> ErrorTable:  # noqa: ANN401  JSON
    ranks = tuple(int(rank) for rank in entry["ranks"])
    errors = tuple(float(error) for error in entry["errors"])
    RankTable(ranks, tuple(map(float, ranks)), errors)  # checks lengths and order
    return ErrorTable(ranks, errors)


def _present(artifact: Artifact, name: str) -> str:
    if name not in artifact.manifest.files:
        raise ArtifactError(
            f"{artifact.path}: has no {name}, which finding points for a host needs; export again"
        )
    return name
