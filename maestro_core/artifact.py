"""The artifact, format 1: a trained network on disk, ready to be served.

Knows the manifest and the digests. Does not know torch, latencies, or what is inside a graph
(graph.py).
"""

import hashlib
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, prod, sqrt
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from maestro_core import writing

FORMAT = 1
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
MANIFEST = "manifest.json"
# Beside the graphs, because ONNX Runtime refuses external data above a graph's own directory.
WEIGHTS = "points/weights.bin"
TEMPLATE = "points/template.onnx"
# Standard deviations to both sides within which a normal distribution has 95 %.
Z_95 = 1.959963984540054
# Intervals in earlier artifacts miss a share of 0 or 1 by less.
_ROUNDING = 1e-9


class ArtifactError(ValueError):
    """An artifact that cannot be read or written; the message names the file and the field."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One factorised map: `out × fan_in`, applied at `positions` places per sample.

    `kernel`, `stride`, `padding` and `dilation` are empty for a linear layer.
    """

    name: str
    kind: Literal["linear", "conv2d"]
    in_features: Annotated[int, Field(alias="in", gt=0)]
    out_features: Annotated[int, Field(alias="out", gt=0)]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    positions: Annotated[int, Field(gt=0)]
    max_rank: Annotated[int, Field(ge=0)]

    @property
    def fan_in(self) -> int:
        """Return how many inputs one output reads."""
        return self.in_features * prod(self.kernel)

    def is_dense(self, rank: int) -> bool:
        """Return whether the dense layer is cheaper than its two factors: r(m + n) > mn."""
        return rank * (self.out_features + self.fan_in) > self.out_features * self.fan_in

    def params(self, rank: int) -> int:
        """Return the weights that `rank` needs, without the bias."""
        size = self.out_features * self.fan_in
        return size if self.is_dense(rank) else rank * (self.out_features + self.fan_in)

    def macs(self, rank: int) -> int:
        """Return the multiply-accumulates of `rank` for one sample."""
        return self.params(rank) * self.positions


@dataclass(frozen=True, slots=True)
class Score:
    """A metric on held-out data, with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of_share(cls, correct: int, n: int) -> "Score":
        """Return the share correct / n with its interval (Wilson, JASA 22, 1927)."""
        share, z2 = correct / n, Z_95**2
        centre = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = Z_95 / (1 + z2 / n) * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
        # Of none or all the share is an end of it, which rounding would miss.
        return cls(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """One rank for every layer, in the order of the manifest's `layers`."""

    ranks: tuple[Annotated[int, Field(ge=0)], ...]
    precision: Literal["fp32"]
    score: Score
    macs: int
    params: int
    graph: str


@dataclass(frozen=True, slots=True)
class Image:
    """How a picture becomes the input tensor: resize, scale to 0..1, (x - mean) / std, NCHW.

    With `shorter` the shorter side is brought to that length and the middle is taken; else all of
    the picture is resized, whatever its proportions.
    """

    mode: Literal["L", "RGB"]
    height: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shorter: int | None = None

    @property
    def channels(self) -> int:
        """Return how many numbers a pixel has."""
        return {"L": 1, "RGB": 3}[self.mode]

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels or not all(map(isfinite, values)):
                raise ValueError(
                    f"{name}: {list(values)}; {self.mode} takes {self.channels} finite numbers"
                )
        if min(self.std) <= 0:
            raise ValueError(f"std: {list(self.std)}; it must be above 0")
        if self.shorter is not None and self.shorter < max(self.height, self.width):
            raise ValueError(
                f"shorter: {self.shorter} leaves less than {self.height}×{self.width} pixels"
            )


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output; `shape` has -1 for the batch."""

    name: str
    dtype: Literal["float32"]
    shape: tuple[int, ...]
    image: Image | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """What a score counts."""

    name: str
    data_set: str
    samples: int
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class File:
    """What a file must be."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """`manifest.json`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: int
    name: Annotated[str, Field(pattern=NAME)]
    version: str
    task: str
    input: Tensor
    output: Tensor
    labels: tuple[str, ...] | None
    metric: Metric
    dense_macs: int
    dense_params: int
    layers: tuple[Layer, ...]
    points: Annotated[tuple[OperatingPoint, ...], Field(min_length=1)]
    files: dict[str, File]
    provenance: dict[str, Any]


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified artifact: its directory, its manifest and the digest that names both."""

    path: Path
    manifest: Manifest
    digest: str
    # Of each point, by the names of the layers. Made once: every answer has them.
    ranks: tuple[dict[str, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.manifest.layers]
        ranks = tuple(dict(zip(names, point.ranks, strict=True)) for point in self.points)
        object.__setattr__(self, "ranks", ranks)

    @property
    def points(self) -> tuple[OperatingPoint, ...]:
        """Return the points, cheapest first."""
        return self.manifest.points

    def graph_path(self, point: int) -> Path:
        """Return the ONNX file of a point."""
        return self.path / self.points[point].graph

    @property
    def template_path(self) -> Path:
        """Return the graph from which points are built (graph.py)."""
        return self.path / TEMPLATE

    @property
    def weights_path(self) -> Path:
        """Return the file that holds every tensor once."""
        return self.path / WEIGHTS


def load(path: Path) -> Artifact:
    """Read and verify the artifact in the directory `path`.

    Raises:
        ArtifactError: it is missing, of another format, damaged, or reaches outside its directory.
    """
    text = _read(path, MANIFEST)
    manifest = _parse(path / MANIFEST, text)
    _check_manifest(path / MANIFEST, manifest)
    for name, file in manifest.files.items():
        _check_file(path, name, file)
    return Artifact(path, manifest, hashlib.sha256(text).hexdigest())


def save(path: Path, manifest: Manifest, contents: Mapping[str, bytes | Path]) -> Artifact:
    """Write the artifact as a whole, or leave `path` as it was; return it as read back.

    `manifest.files` is replaced by the sizes and digests of `contents`: path -> bytes, or the file
    that holds them.

    Raises:
        ArtifactError: the manifest is wrong, a file of `contents` can't be read, or the disk does
            not take it.
    """
    files = {name: _file(value) for name, value in sorted(contents.items())}
    manifest = replace(manifest, files=files)
    text = _MANIFEST.dump_json(manifest, indent=1, by_alias=True) + b"\n"
    _check_manifest(path / MANIFEST, _parse(path / MANIFEST, text))
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, data in {**contents, MANIFEST: text}.items():
            _write(aside / _inside(path, name), data)
        writing.replace_directory(aside, path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return load(path)


def check_replaceable(path: Path) -> None:
    """Refuse a path where something is that is no artifact: `save` would remove it.

    Raises:
        ArtifactError: a file, or a directory without a manifest that is not empty.
    """
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path}: is there, and is no artifact that could be replaced")


def _read(path: Path, name: str) -> bytes:
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such artifact directory")
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path / name}: {error.strerror or error}") from error


def _parse(path: Path, text: bytes) -> Manifest:
    # The format number first: another format may have other fields.
    found = re.search(rb'"format"\s*:\s*("[^"]*"|[^,}\s]+)', text)
    if found and found.group(1) != str(FORMAT).encode():
        number = found.group(1).decode(errors="replace")
        raise ArtifactError(f"{path}: format {number} is unknown; this version reads {FORMAT}")
    try:
        return _MANIFEST.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {field or 'JSON'}: {first['msg']}") from error


def _check_manifest(path: Path, manifest: Manifest) -> None:
    """Refuse fields that are valid one by one and can't be served together."""
    for name in (WEIGHTS, TEMPLATE):
        if name not in manifest.files:
            raise ArtifactError(f"{path}: files: '{name}' is missing")
    _check_shapes(path, manifest)
    _check_scores(path, manifest)
    _check_points(path, manifest)


def _check_shapes(path: Path, manifest: Manifest) -> None:
    for side, tensor in (("input", manifest.input), ("output", manifest.output)):
        if tensor.shape[:1] != (-1,) or any(size < 1 for size in tensor.shape[1:]):
            raise ArtifactError(
                f"{path}: {side}.shape: {list(tensor.shape)}; it must be -1 for the batch, and "
                "then sizes of 1 or more"
            )
    labels, shape = manifest.labels, manifest.output.shape
    if labels is not None and shape != (-1, len(labels)):
        raise ArtifactError(f"{path}: labels: {len(labels)} for an output of shape {list(shape)}")
    image, shape = manifest.input.image, manifest.input.shape
    if image is not None and shape != (-1, image.channels, image.height, image.width):
        raise ArtifactError(
            f"{path}: input.shape: {list(shape)}, but input.image is {image.channels}×"
            f"{image.height}×{image.width}"
        )


def _check_scores(path: Path, manifest: Manifest) -> None:
    if not manifest.metric.higher_is_better:
        raise ArtifactError(
            f"{path}: metric.higher_is_better: false; format {FORMAT} serves scores of 0..1 where "
            "higher is better"
        )
    for i, point in enumerate(manifest.points):
        value, low, high = point.score.value, point.score.low, point.score.high
        within = all(0 <= part <= 1 for part in (value, low, high))
        if not (within and low - _ROUNDING <= value <= high + _ROUNDING):
            raise ArtifactError(
                f"{path}: points.{i}.score: {value} in {low}..{high}; it must be within 0..1, and "
                "in its interval"
            )


def _check_points(path: Path, manifest: Manifest) -> None:
    cheaper: Sequence[int] = [0] * len(manifest.layers)
    for i, point in enumerate(manifest.points):
        where = f"{path}: points.{i}"
        if len(point.ranks) != len(manifest.layers):
            raise ArtifactError(
                f"{where}.ranks: {len(point.ranks)} ranks for {len(manifest.layers)} layers"
            )
        for layer, rank, less in zip(manifest.layers, point.ranks, cheaper, strict=True):
            if rank > layer.max_rank:
                raise ArtifactError(
                    f"{where}.ranks: layer '{layer.name}' has ranks 0..{layer.max_rank}, not {rank}"
                )
            if rank < less:
                raise ArtifactError(
                    f"{where}.ranks: layer '{layer.name}' falls below points.{i - 1}"
                )
        cheaper = point.ranks
        if point.graph not in manifest.files:
            raise ArtifactError(f"{where}.graph: '{point.graph}' is not in files")


def _check_file(path: Path, name: str, file: File) -> None:
    target = path / _inside(path, name)
    if not target.resolve().is_relative_to(path.resolve()):
        raise ArtifactError(f"{path / MANIFEST}: files: '{name}' leaves the artifact")
    data = _read(path, name)
    if len(data) != file.size:
        raise ArtifactError(f"{target}: {len(data)} bytes, but the manifest says {file.size}")
    if _sha256(data) != file.sha256:
        raise ArtifactError(f"{target}: its SHA-256 is not the one in the manifest")


def _inside(path: Path, name: str) -> PurePosixPath:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise ArtifactError(f"{path / MANIFEST}: files: '{name}' leaves the artifact")
    return relative


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file(value: bytes | Path) -> File:
    try:
        data = value.read_bytes() if isinstance(value, Path) else value
    except OSError as error:
        raise ArtifactError(f"{value!s}: {error.strerror or error}") from error
    return File(len(data), _sha256(data))


def _write(path: Path, value: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, Path):
        writing.copy(value, path)  # onnx refuses to read weights from a file with two names
    else:
        writing.write(path, value)
