"""Points made ready for one host: optimised graphs over one file of weights as kernels want them.

ONNX Runtime lays weights out anew for the kernels of the CPU at hand, and keeps a private copy in
every session. Baking writes what it makes (`session.save_external_prepacked_constant_initializers`)
and puts each tensor of all points into one file once: equal bytes are shared, and so is a tensor
that is a prefix of a longer one, as the ranks of a layer's first factor are (`server.products`).
Sessions map that file: full speed, clean pages, and what points have in common is in memory once.
Or they take what kernels read as it is stored, the file's beginning, from `server.huge_pages`.
The layout depends on CPU and runtime; `bake` is told a key and bakes again when it differs.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto

from maestro_core import writing
from maestro_core.locking import locked
from server.products import down_first
from server.pruning import mark_used, prune

# Raised when what is baked changes: what was baked before, and profiles of it, hold no more.
LAYOUT = 4
_WEIGHTS = "weights.bin"
_INDEX = "baked.json"
_PAGE_BYTES = 4096
_BEGIN_BYTES = 256  # by which a candidate for sharing is found
_PREPACKED = "prepacked"  # begins the external-data keys of what kernels laid out anew
_INLINE_BYTES = 1024  # smaller tensors stay in the graph
_KEPT = 4  # of artifacts last used; hundreds of MiB each


class BakeError(OSError):
    """The state directory can't be written; points are loaded from the artifact."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A tensor of 32-bit floats in the file of weights, which begins at a byte of it."""

    name: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Baked:
    """A verified directory of baked points; `pages[i]` are the spans that point i maps.

    What kernels read as it is stored, of all points, is the first `plain_bytes` of the weights.
    """

    path: Path
    pages: tuple[tuple[tuple[int, int], ...], ...]  # per point: (offset, length) in weights.bin
    plain_bytes: int

    @property
    def weights_path(self) -> Path:
        """Return the file that all points share."""
        return self.path / _WEIGHTS

    def graph_path(self, point: int) -> Path:
        """Return the ONNX file of a point."""
        return self.path / f"{point:02}.onnx"

    def plain(self, point: int) -> list[Plain]:
        """Return what a point's kernels read as it is stored."""
        return [
            Plain(tensor.name, tuple(tensor.dims), int(_fields(tensor)["offset"]))
            for tensor in _external(_read(self.graph_path(point)))
            if _is_plain(tensor)
        ]

    def mapped_bytes(self, points: Iterable[int]) -> int:
        """Return how much of the file these points map together, each byte counted once."""
        total, end = 0, 0
        for offset, length in sorted(span for point in points for span in self.pages[point]):
            total += max(0, offset + length - max(offset, end))
            end = max(end, offset + length)
        return total


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes that a tensor of a point needs: a span of a file."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


def bake(
    graphs: Sequence[Path],
    directory: Path,
    key: str,
    options: Callable[[], ort.SessionOptions],
) -> Baked:
    """Return the baked points of `graphs`, from `directory` where its key is `key`, else made now.

    What is made takes the place of the directory beside it that was used longest ago. Processes
    that start at once bake once: the others wait, and read what the first made.

    Raises:
        BakeError: no permission, or no space; nothing is left half-written.
    """
    found = _find(directory, key, len(graphs))
    if found:
        return found
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with locked(directory.parent):
            found = _find(directory, key, len(graphs))
            if found is None:
                _replace(directory, graphs, key, options)
    except OSError as error:
        made_by_another = _find(directory, key, len(graphs))
        if made_by_another:
            return made_by_another
        raise BakeError(f"{directory}: points not baked: {error.strerror or error}") from error
    baked = found or _find(directory, key, len(graphs))
    if baked is None:
        raise BakeError(f"{directory}: what was baked does not read back")
    prune(directory.parent, _KEPT)
    return baked


def _replace(
    directory: Path, graphs: Sequence[Path], key: str, options: Callable[[], ort.SessionOptions]
) -> None:
    beside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        _bake(graphs, beside, key, options)
        writing.replace_directory(beside, directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _bake(
    graphs: Sequence[Path], to: Path, key: str, options: Callable[[], ort.SessionOptions]
) -> None:
    optimised = to / "optimised"
    optimised.mkdir()
    models = [_optimise(path, optimised, i, options()) for i, path in enumerate(graphs)]
    plain = {
        _whole(tensor, optimised) for m in models for tensor in _external(m) if _is_plain(tensor)
    }
    chunks = {chunk for model in models for chunk in _chunks(model, optimised)}
    offsets = _write_shared(to / _WEIGHTS, chunks, first=plain)
    pages = []
    for i, model in enumerate(models):
        spans = _point_at(model, optimised, offsets)
        pages.append(spans)
        writing.write(to / f"{i:02}.onnx", model.SerializeToString())
    shutil.rmtree(optimised)
    files = sorted(path for path in to.iterdir() if path.is_file())
    index = {
        "key": key,
        "pages": pages,
        "plain_bytes": max((offsets[chunk] + chunk.length for chunk in plain), default=0),
        "files": {path.name: _sha256(path) for path in files},
    }
    writing.write(to / _INDEX, json.dumps(index).encode())


def _optimise(graph: Path, to: Path, i: int, options: ort.SessionOptions) -> ModelProto:
    """Return the graph as the runtime would run it; its weights are in `to`."""
    path = to / f"{i:02}.onnx"
    options.optimized_model_filepath = str(path)
    for entry, value in (
        ("session.optimized_model_external_initializers_file_name", f"{i:02}.bin"),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(_INLINE_BYTES)),
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.model_external_initializers_file_folder_path", str(graph.parent)),
    ):
        options.add_session_config_entry(entry, value)
    model = down_first(_read(graph))
    source = model.SerializeToString()
    try:
        ort.InferenceSession(source, options, ["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own classes share no base but this
        options.optimized_model_filepath = ""
        ort.InferenceSession(source, options, ["CPUExecutionProvider"])  # or it is the graph's
        _check_room(to, sum(_whole(tensor, to).length for tensor in _external(model)))
        first_line = str(error).partition("\n")[0]
        raise OSError(errno.EIO, f"nothing could be written ({first_line})") from error
    return _read(path)


def _check_room(folder: Path, size: int) -> None:
    """Have the system say what it has against another `size` bytes: the runtime does not tell.

    Raises:
        OSError: there is no room.
    """
    if size and hasattr(os, "posix_fallocate"):
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)


def _read(graph: Path) -> ModelProto:
    try:
        return onnx.load(graph, load_external_data=False)
    except Exception as error:  # protobuf's own class, which comes without types
        raise ValueError(f"{graph}: {error}") from error


def _chunks(model: ModelProto, folder: Path) -> Iterable[_Chunk]:
    for tensor in _external(model):
        yield _whole(tensor, folder)
        for name, value in _fields(tensor).items():
            if name.startswith(_PREPACKED):
                yield from _prepacked(value, folder / _fields(tensor)["location"])


def _external(model: ModelProto) -> Iterable[TensorProto]:
    return (t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)


def _fields(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _is_plain(tensor: TensorProto) -> bool:
    """Return whether kernels read a tensor as it is stored, and not what was laid out anew."""
    return tensor.data_type == TensorProto.FLOAT and not any(
        name.startswith(_PREPACKED) for name in _fields(tensor)
    )


def _whole(tensor: TensorProto, folder: Path) -> _Chunk:
    fields = _fields(tensor)
    return _Chunk(folder / fields["location"], int(fields["offset"]), int(fields["length"]))


def _prepacked(value: str, path: Path) -> list[_Chunk]:
    """Return the blobs of an entry `kernel key|offset;length;checksum|…`."""
    blobs = (blob.split(";") for blob in value.split("|")[1:])
    return [_Chunk(path, int(offset), int(length)) for offset, length, _ in blobs]


def _write_shared(
    path: Path, chunks: Iterable[_Chunk], first: Collection[_Chunk]
) -> dict[_Chunk, int]:
    """Write chunks into one file, each once, prefixes inside what they begin; return offsets.

    Those in `first` make its beginning.
    """

    def order(chunk: _Chunk) -> tuple[bool, int, Path, int]:
        return (chunk not in first, -chunk.length, chunk.path, chunk.offset)

    offsets: dict[_Chunk, int] = {}
    stored: dict[bytes, list[tuple[int, int]]] = defaultdict(list)  # beginning -> (offset, length)
    with path.open("w+b") as file:
        for chunk in sorted(chunks, key=order):
            data = chunk.read()
            begins = stored[data[:_BEGIN_BYTES]]
            offset = next((at for at, n in begins if _holds(file, at, n, data)), None)
            if offset is None:
                offset = file.seek(-(-file.seek(0, os.SEEK_END) // _PAGE_BYTES) * _PAGE_BYTES)
                file.write(data)
                begins.append((offset, len(data)))
            offsets[chunk] = offset
        writing.flush(file)
        _forget(file)
    return offsets


def _holds(file: BinaryIO, offset: int, length: int, data: bytes) -> bool:
    file.seek(offset)
    return len(data) <= length and file.read(len(data)) == data


def _point_at(
    model: ModelProto, folder: Path, offsets: Mapping[_Chunk, int]
) -> list[tuple[int, int]]:
    """Make a graph refer to the shared file; return the spans that it computes with."""
    spans: list[tuple[int, int]] = []
    for tensor in _external(model):
        fields = {entry.key: entry for entry in tensor.external_data}
        path = folder / fields["location"].value
        packed = [entry for name, entry in fields.items() if name.startswith(_PREPACKED)]
        plain = _whole(tensor, folder)
        used = [blob for entry in packed for blob in _prepacked(entry.value, path)] or [plain]
        spans.extend((offsets[chunk], chunk.length) for chunk in used)
        fields["location"].value = _WEIGHTS
        fields["offset"].value = str(offsets[plain])
        for entry in packed:
            kernel, *blobs = entry.value.split("|")
            moved = [
                f"{offsets[chunk]};{chunk.length};{blob.rpartition(';')[2]}"
                for chunk, blob in zip(_prepacked(entry.value, path), blobs, strict=True)
            ]
            entry.value = "|".join((kernel, *moved))
    return spans


def _find(directory: Path, key: str, points: int) -> Baked | None:
    """Return what a directory holds if it is whole and made for `key`."""
    try:
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        pages = tuple(tuple((int(at), int(n)) for at, n in spans) for spans in index["pages"])
        baked, files = Baked(directory, pages, int(index["plain_bytes"])), index["files"]
        whole = index["key"] == key and len(pages) == points and _names_all(files, baked)
        if whole and all(_sha256(directory / n) == d for n, d in files.items()):
            mark_used(directory)
            return baked
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None  # nothing there, or damaged: baked anew
    return None


def _names_all(files: Mapping[str, str], baked: Baked) -> bool:
    """Return whether these are the files of all points, and the weights as long as is said."""
    paths = [baked.weights_path, *(baked.graph_path(i) for i in range(len(baked.pages)))]
    return (
        files.keys() >= {path.name for path in paths}
        and 0 <= baked.plain_bytes <= baked.weights_path.stat().st_size
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        _read_by_page(file)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _forget(file: BinaryIO) -> None:
    """Have the system drop what it keeps in memory of `file`, all of which is on disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_by_page(file: BinaryIO) -> None:
    """Have the system read `file` into single pages, not into spans of up to 2 MiB.

    It lies in memory as it was first read, and sessions map that. On an Intel Xeon under Linux 6.18
    kernels take longer over weights that lie in long spans, where these are not in a cache.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
