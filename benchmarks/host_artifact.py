"""Keeps the points that a host found, as an artifact of their own under the state directory."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import onnxruntime as ort
from onnx import ModelProto, TensorProto, numpy_helper

from benchmarks.host_points import Candidate, Found, Network, search
from benchmarks.layer_latencies import Measuring
from maestro_core import artifact, graph, held_out
from maestro_core.artifact import Artifact, ArtifactError, OperatingPoint
from maestro_core.host import Host
from server.pruning import mark_used, prune

POINTS = 16
_KEPT = 4  # of artifacts last served; each holds its weights
_ASIDE = "found-"  # points that are measured yet
_ABANDONED_S = 24 * 3600.0


class Kept(NamedTuple):
    """The artifact to serve, and why it is not that of this host, where there is a reason."""

    artifact: Artifact
    note: str | None


@contextmanager
def searched(source: Artifact, state_dir: Path, measuring: Measuring) -> Iterator[Artifact]:
    """Find the points of this host; yield them as an artifact that is gone afterwards.

    Raises:
        ArtifactError: the artifact can't be searched, or the state directory not be written.
        CancelledError: the measuring was cancelled.
    """
    network = Network.of(source)
    found = search(network, POINTS, measuring)
    with _aside(state_dir) as folder:
        yield save(network, found, folder / f"{source.manifest.name}.maestro")


@contextmanager
def _aside(state_dir: Path) -> Iterator[Path]:
    """Yield a new directory there, on the disk that has room, and remove what a kill left."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        for old in state_dir.glob(f"{_ASIDE}*"):
            with suppress(FileNotFoundError):  # another process is done with it meanwhile
                if time.time() - old.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(old, ignore_errors=True)
        folder = TemporaryDirectory(prefix=_ASIDE, dir=state_dir, ignore_cleanup_errors=True)
    except OSError as error:
        raise ArtifactError(f"{state_dir}: {error.strerror}") from error
    with folder as name:
        yield Path(name)


def keep(found: Artifact, source: Artifact, state_dir: Path, intra_op_threads: int) -> Artifact:
    """Keep the points that were found for this host in the place of those before; return them.

    Those of the artifact served longest ago give way.

    Raises:
        ArtifactError: the state directory can't be written.
    """
    contents = {name: found.path / name for name in found.manifest.files}
    path = host_path(source, state_dir, intra_op_threads)
    kept = artifact.save(path, found.manifest, contents)
    prune(kept.path.parent, _KEPT)
    return kept


def of_host(source: Artifact, state_dir: Path, intra_op_threads: int) -> Kept:
    """Return the points found earlier for this host, or else those of the artifact itself."""
    path = host_path(source, state_dir, intra_op_threads)
    if not path.exists():
        return Kept(source, None)
    mark_used(path)
    try:
        return Kept(artifact.load(path), None)
    except ArtifactError as error:
        return Kept(source, f"points of this host not used: {error}; search again")


def host_path(source: Artifact, state_dir: Path, intra_op_threads: int) -> Path:
    """Return where the points of an artifact for this host and runtime are kept."""
    key = [source.digest, asdict(Host.here()), ort.__version__, intra_op_threads]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return state_dir / "points" / f"{name}.maestro"


def save(network: Network, found: Found, path: Path) -> Artifact:
    """Write the points as an artifact over the same weights, and return it.

    Dense weights that a point needs and the file lacks are put behind the others.

    Raises:
        ArtifactError: the disk does not take it.
    """
    manifest, source = network.artifact.manifest, network.artifact
    contents: dict[str, bytes | Path] = {
        name: source.path / name for name in manifest.files if not _is_graph(manifest, name)
    }
    placed: dict[str, TensorProto] = {}
    needed = {f"{name}.dense" for candidate in found.points for name in candidate.plan.dense}
    if added := {n: numpy_helper.to_array(t) for n, t in network.dense.items() if n in needed}:
        weights = bytearray(source.weights_path.read_bytes())
        placed = graph.place_(weights, added)
        contents[artifact.WEIGHTS] = bytes(weights)
    points = []
    for i, candidate in enumerate(found.points):
        name = f"points/{i:02}.onnx"
        contents[name] = _referring(candidate.model, placed).SerializeToString()
        points.append(_point(network, candidate, name))
    metric = replace(
        manifest.metric,
        data_set=f"{held_out.EVAL} of {manifest.name}",
        samples=found.points[0].samples,
    )
    provenance = {
        **manifest.provenance,
        "searched": {
            "from": source.digest,
            "host": asdict(Host.here()),
            "correction": asdict(found.correction),
            "dense_when_whole": sorted(found.dense_when_whole),
        },
    }
    of_host = replace(manifest, points=tuple(points), metric=metric, provenance=provenance)
    return artifact.save(path, of_host, contents)


def _is_graph(manifest: artifact.Manifest, name: str) -> bool:
    return name in {point.graph for point in manifest.points}


def _referring(model: ModelProto, placed: Mapping[str, TensorProto]) -> ModelProto:
    """Return a graph that reads tensors from the weights file instead of holding them."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in placed:
            tensor.CopyFrom(placed[tensor.name])
    return copy


def _point(network: Network, candidate: Candidate, name: str) -> OperatingPoint:
    """Return a point; what no rank changes costs what it does in the artifact's own points."""
    known = network.artifact.points[-1]
    macs, params = known.macs, known.params
    by_layer = zip(network.layers, known.ranks, candidate.ranks, strict=True)
    for layer, before, rank in by_layer:
        size = layer.out_features * layer.fan_in
        factors = rank * (layer.out_features + layer.fan_in)
        more = (size if layer.name in candidate.plan.dense else factors) - layer.params(before)
        params += more
        macs += more * layer.positions
    return OperatingPoint(candidate.ranks, "fp32", candidate.score, macs, params, name)
