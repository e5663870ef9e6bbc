"""Labelled pictures in class folders: train/CLASS/*, val/CLASS/* and, where there is one, test/.

Names are read, and the test pictures once; all others when they are needed (picture_files.py).
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from maestro_core.artifact import Image
from maestro_core.data import Data, DataError, Pictures
from maestro_core.picture_files import Crop, PictureFiles

SUFFIXES = (".jpg", ".jpeg", ".png")
CHECKED = 64  # test pictures between two signs of life

# Of each picture its name below the data set's folder and its size in bytes, by class; all sorted.
Found = dict[str, list[tuple[str, int]]]


@dataclass(frozen=True, slots=True)
class Folders:
    """How many class folders a recipe expects, and what training takes of their pictures."""

    classes: int
    crop: Crop = field(default_factory=Crop)


def load(
    path: Path,
    image: Image,
    folders: Folders,
    validation: int,
    seed: int,
    workers: int,
    on_check: Callable[[int, int], None],
) -> Data:
    """Return the pictures in `path`, read by `workers` threads and labelled by their folders.

    With a `test/`, `val/` chooses and `test/` scores. Without, `val/` scores, as it does in what is
    published on ImageNet, and `validation` training pictures, drawn by `seed`, choose. Each split
    is in an order drawn by `seed`: its first pictures have to stand for all. Test pictures are all
    decoded here, as a broken one would else show after the last epoch; `on_check` is told how many
    have been, and of how many.

    Raises:
        DataError: a folder or a class is missing, or holds something else.
        PictureError: a test picture is broken.
    """
    if path.is_file():
        raise DataError(f"{path}: a file; this recipe reads a folder with train/ and val/ in it")
    parts = ["train", "val", *(["test"] if (path / "test").is_dir() else [])]
    found = {part: _find(path, part) for part in parts}
    classes = tuple(found["train"])
    _check_classes(path, found, folders.classes)
    chosen = {part: _shuffled(found[part], classes, seed) for part in parts}
    train, choosing, scoring = chosen["train"], chosen["val"], chosen[parts[-1]]
    if len(parts) == 2:
        if not 0 < validation < len(train):
            raise DataError(
                f"{path / 'train'}: {len(train)} pictures; {validation} can't be for validation"
            )
        train, choosing = train[validation:], train[:validation]
    files = PictureFiles(path, [], image, workers)
    test = _pictures(files, scoring)
    _check(test, on_check)
    return Data(
        train=_pictures(replace(files, crop=folders.crop), train),
        validation=_pictures(files, choosing),
        test=test,
        name=path.name,
        sha256=digest(found),
        classes=classes,
        scoring="validation" if parts[-1] == "val" else "test",
    )


def digest(found: dict[str, Found]) -> str:
    """Return the SHA-256 of all names and sizes: another file in place of one as long isn't seen.

    To read every byte at each start would take as long as some epochs.
    """
    lines = (
        f"{name}\0{size}\n"
        for classes in found.values()
        for pictures in classes.values()
        for name, size in pictures
    )
    sha256 = hashlib.sha256()
    for line in lines:
        sha256.update(os.fsencode(line))
    return sha256.hexdigest()


def _find(root: Path, part: str) -> Found:
    folder = root / part
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: no class folders in it, each with the pictures of one class")
    return {name: _find_pictures(folder / name, f"{part}/{name}") for name in names}


def _find_pictures(folder: Path, prefix: str) -> list[tuple[str, int]]:
    if not folder.name.isprintable():
        raise DataError(f"{str(folder)!r}: the name of a class must be printable")
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_file() or not entry.name.lower().endswith(SUFFIXES):
                raise DataError(f"{folder / entry.name}: not one of {', '.join(SUFFIXES)}")
            found.append((f"{prefix}/{entry.name}", entry.stat().st_size))
    if not found:
        raise DataError(f"{folder}: no pictures of this class")
    return sorted(found)


def _check_classes(path: Path, found: dict[str, Found], classes: int) -> None:
    if len(found["train"]) != classes:
        raise DataError(
            f"{path / 'train'}: {len(found['train'])} class folders; the recipe has {classes}"
        )
    for part, names in found.items():
        unknown = sorted(names.keys() - found["train"].keys())
        if unknown:
            raise DataError(f"{path / part / unknown[0]}: there is no such class in train")
        missing = sorted(found["train"].keys() - names.keys())
        if missing:
            raise DataError(f"{path / part / missing[0]}: no such folder, but it is in train")


def _shuffled(found: Found, classes: Sequence[str], seed: int) -> list[tuple[str, int]]:
    """Return the name and label of each picture."""
    labels = {name: label for label, name in enumerate(classes)}
    samples = [(name, labels[c]) for c, pictures in found.items() for name, _ in pictures]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return [samples[i] for i in order.tolist()]


def _pictures(files: PictureFiles, samples: Sequence[tuple[str, int]]) -> Pictures:
    named = replace(files, names=[name for name, _ in samples])
    return Pictures(named, torch.tensor([label for _, label in samples]), files.image)


def _check(pictures: Pictures, on_check: Callable[[int, int], None]) -> None:
    done = 0
    for _, labels in pictures.batches(CHECKED):
        done += len(labels)
        on_check(done, len(pictures))
