"""Class folders: what is read from them, in which order, and what is refused."""

import io
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from torch import Tensor

from maestro_core import folders, framing
from maestro_core.artifact import Image
from maestro_core.artifact import Tensor as TensorSpec
from maestro_core.data import Data, DataError
from maestro_core.folders import Folders
from maestro_core.picture_files import AHEAD, Crop, PictureError, PictureFiles
from server import inputs
from tests.stops import Stops
from tests.test_training import HYPER, network, same, train

COLOUR = Image("RGB", 8, 10, (0.1, 0.2, 0.3), (0.5, 0.25, 1.0), shorter=12)
GREY = Image("L", 6, 6, (0.5,), (0.25,), shorter=8)
CROP = Crop()
CLASSES = ("ant", "bee", "cow")


def write_folders(root: Path, parts: dict[str, int], classes: tuple[str, ...] = CLASSES) -> Path:
    """Write so many pictures a class and part, of mixed sizes and kinds; the class is a hue."""
    rng = np.random.default_rng(0)
    for part, count in parts.items():
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(12, 60, 2)
                pixels = rng.integers(0, 120, (height, width, 3), dtype=np.uint8)
                pixels[..., label % 3] += 100
                kind = "jpg" if i % 2 else "PNG"
                Pillow.fromarray(pixels).save(folder / f"{i:02}.{kind}")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("data") / "insects", {"train": 10, "val": 4})


def read(
    path: Path,
    *,
    image: Image = COLOUR,
    validation: int = 6,
    seed: int = 0,
    workers: int = 2,
    crop: Crop = CROP,
    classes: int = 3,
) -> Data:
    expected = Folders(classes, crop)
    return folders.load(path, image, expected, validation, seed, workers, lambda *_: None)


def names(data: Data) -> list[list[str]]:
    found = []
    for part in (data.train, data.validation, data.test):
        assert isinstance(part.pixels, PictureFiles)
        found.append(part.pixels.names)
    return found


def test_without_test_val_scores_and_validation_leaves_train(root: Path) -> None:
    data = read(root)

    train, validation, test = names(data)
    assert (len(train), len(validation), len(test)) == (24, 6, 12)
    assert len({*train, *validation}) == 30
    assert all(name.startswith("train/") for name in (*train, *validation))
    assert all(name.startswith("val/") for name in test)
    assert (data.name, data.classes, data.scoring) == ("insects", CLASSES, "validation")


def test_with_test_val_chooses_and_train_is_whole(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", {"train": 3, "val": 2, "test": 1})

    data = read(root)

    train, validation, test = names(data)
    assert (len(train), len(validation), len(test)) == (9, 6, 3)
    assert data.scoring == "test"
    assert all(name.startswith("val/") for name in validation)
    assert all(name.startswith("test/") for name in test)


def test_a_picture_is_labelled_by_its_folder_and_the_first_stand_for_all(root: Path) -> None:
    data = read(root)

    for part, files in zip((data.train, data.validation, data.test), names(data), strict=True):
        labels = [CLASSES[label] for label in part.labels.tolist()]
        assert labels == [name.split("/")[1] for name in files]
        assert labels != sorted(labels)


def test_the_split_and_the_order_depend_on_the_seed_alone(root: Path) -> None:
    assert names(read(root)) == names(read(root, workers=5))
    assert names(read(root)) != names(read(root, seed=1))


def test_a_picture_is_in_training_what_the_server_makes_of_it(root: Path) -> None:
    data = read(root)
    spec = TensorSpec("image", "float32", (-1, 3, 8, 10), COLOUR)

    x, _ = data.test.batch(slice(2, 9))

    sent = [(root / name).read_bytes() for name in names(data)[2][2:9]]
    expected = np.concatenate([inputs.from_image(body, spec) for body in sent])
    assert x.shape == (7, 3, 8, 10)
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(48, 72), (96, 48), (24, 24)])
def test_the_middle_is_what_is_left_after_resizing_and_cutting(size: tuple[int, int]) -> None:
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Pillow.fromarray(pixels)
    scale = COLOUR.shorter / min(size) if COLOUR.shorter else 0
    resized = picture.resize((round(scale * width), round(scale * height)), 2)
    left, top = (resized.width - 10) // 2, (resized.height - 8) // 2

    found = framing.pixels(picture, COLOUR, framing.middle(COLOUR, *size))

    cut = np.asarray(resized.crop((left, top, left + 10, top + 8)), int)
    assert np.abs(found - cut).max() <= 1


def test_batches_and_the_first_are_what_single_pictures_are(root: Path) -> None:
    data = read(root).train
    whole, labels = data.batch(slice(None))

    batches = list(data.batches(7))
    few = data.first(5)

    assert torch.equal(torch.cat([x for x, _ in batches]), whole)
    assert torch.equal(torch.cat([y for _, y in batches]), labels)
    assert isinstance(few.pixels, Tensor), "pictures that are read over and over are in memory"
    assert torch.equal(few.batch(slice(None))[0], whole[:5])
    assert torch.equal(data.batch(torch.tensor([4, 2]))[0], whole[[4, 2]])


def augmented(data: Data, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    batches = torch.split(torch.randperm(len(data.train)), 5)
    return [x for x, _ in data.train.augmented(batches)]


def test_what_training_sees_depends_on_the_seed_and_not_on_the_workers(root: Path) -> None:
    seen = [augmented(read(root, workers=workers), 3) for workers in (1, 2, 7)]
    other = augmented(read(root), 4)

    for batches in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], batches, strict=True))
    assert not torch.equal(other[0], seen[0][0])


def test_a_crop_depends_on_the_picture_and_not_on_its_batch(root: Path) -> None:
    files = read(root).train.pixels
    assert isinstance(files, PictureFiles)

    (one,) = files.read([torch.tensor([3, 1])], seed=7)
    two = list(files.read([torch.tensor([0]), torch.tensor([5, 2, 3])], seed=7))
    (another,) = files.read([torch.tensor([3])], seed=8)

    assert torch.equal(one[0], two[1][2])
    assert not torch.equal(one[0], another[0])


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32))
def test_a_crop_lies_in_the_picture(width: int, height: int, seed: int) -> None:
    (left, top, right, lower), _ = Crop(0.3).draw(width, height, Random(seed))

    assert 0 <= left < right <= width
    assert 0 <= top < lower <= height
    if 3 / 4 <= width / height <= 4 / 3:
        assert (right - left) * (lower - top) >= 0.3 * width * height * (1 - 1e-9)
    assert (
        math.log(3 / 4) - 1e-9 <= math.log((right - left) / (lower - top)) <= 1e-9 + math.log(4 / 3)
    )


def test_half_of_the_pictures_are_flipped(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", {"train": 30, "val": 1})
    for path in root.rglob("train/*/*"):
        picture = Pillow.open(path).resize((20, 20))
        picture.save(path)
    whole = Image("RGB", 20, 20, (0.5,) * 3, (0.5,) * 3)
    # A square has no part as large as itself that is not one, so all of it is taken.
    files = read(root, image=whole, crop=Crop(least_area=1.0)).train.pixels
    assert isinstance(files, PictureFiles)

    (seen,) = files.read([slice(None)], seed=1)

    plain = files[:]
    flipped = [torch.equal(a, b.flip(1)) for a, b in zip(seen, plain, strict=True)]
    assert 0.3 < sum(flipped) / len(flipped) < 0.7
    assert all(f or torch.equal(a, b) for f, a, b in zip(flipped, seen, plain, strict=True))


def test_batches_are_read_ahead(root: Path) -> None:
    asked: list[int] = []

    def batches() -> Iterator[Tensor]:
        for i in range(10):
            asked.append(i)
            yield torch.tensor([i])

    files = read(root).train.pixels
    assert isinstance(files, PictureFiles)
    reading = files.read(batches())
    next(reading)
    assert len(asked) == 1 + AHEAD
    next(reading)
    assert len(asked) == 2 + AHEAD
    assert len(list(reading)) == 8


def test_a_run_that_is_resumed_with_other_workers_ends_with_the_same_bits(
    root: Path, tmp_path: Path
) -> None:
    hyper = replace(HYPER, batch_size=8)
    whole, stopped, resumed = network(), network(), network()
    train(whole, read(root, image=GREY, workers=1), tmp_path / "whole", hyper)

    three = read(root, image=GREY, workers=3)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, three, tmp_path / "cut", hyper, Stops(5))
    train(resumed, read(root, image=GREY, workers=2), tmp_path / "cut", hyper)

    assert same(whole, resumed)


def test_batches_are_put_on_the_device_of_the_data(root: Path) -> None:
    data = read(root).on(torch.device("meta"))

    x, labels = next(data.train.augmented([torch.arange(3)]))

    assert x.device == labels.device == data.test.batch(slice(2))[0].device == torch.device("meta")


def test_the_digest_sees_names_and_sizes(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", {"train": 3, "val": 2})
    before = read(root)
    assert read(write_folders(tmp_path / "again", {"train": 3, "val": 2})).sha256 == before.sha256

    (root / "train/ant/00.PNG").rename(root / "train/ant/07.PNG")
    renamed = read(root)
    shutil.copy(root / "train/bee/01.jpg", root / "train/ant/07.png")
    longer = read(root)

    assert len({before.sha256, renamed.sha256, longer.sha256}) == 3


def test_hidden_files_are_passed_over(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "insects")
    (copy / "train" / "ant" / ".DS_Store").write_bytes(b"\0")
    (copy / "train" / ".cache").mkdir()

    assert read(copy).sha256 == read(root).sha256


def spoil(root: Path, what: str) -> None:
    if what in ("no val", "no classes"):
        shutil.rmtree(root / "val")
    if what == "no classes":
        (root / "val").mkdir()
        (root / "val" / "1.jpg").touch()
    elif what == "empty class":
        shutil.rmtree(root / "train" / "bee")
        (root / "train" / "bee").mkdir()
    elif what == "unknown class":
        (root / "val" / "bee").rename(root / "val" / "wasp")
    elif what == "missing class":
        shutil.rmtree(root / "val" / "bee")
    elif what == "one class more":
        shutil.copytree(root / "train" / "bee", root / "train" / "wasp")
    elif what == "notes":
        (root / "train" / "bee" / "notes.txt").touch()
    elif what == "a folder":
        (root / "val" / "bee" / "images.png").mkdir()
    elif what == "test without classes":
        (root / "test").mkdir()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no val", "val: no such folder"),
        ("no classes", "val: no class folders in it"),
        ("empty class", "train/bee: no pictures of this class"),
        ("unknown class", "val/wasp: there is no such class in train"),
        ("missing class", "val/bee: no such folder, but it is in train"),
        ("one class more", "train: 4 class folders; the recipe has 3"),
        ("notes", r"train/bee/notes\.txt: not one of \.jpg, \.jpeg, \.png"),
        ("a folder", r"val/bee/images\.png: not one of"),
        ("test without classes", "test: no class folders in it"),
    ],
)
def test_what_is_wrong_with_folders_is_named(tmp_path: Path, what: str, message: str) -> None:
    root = write_folders(tmp_path / "data", {"train": 3, "val": 1})
    spoil(root, what)

    with pytest.raises(DataError, match=rf"data/{message}"):
        read(root)


@pytest.mark.parametrize("validation", [0, 30, -1])
def test_a_validation_split_must_leave_something_to_train(root: Path, validation: int) -> None:
    with pytest.raises(DataError, match=rf"train: 30 pictures; {validation} can't"):
        read(root, validation=validation)


def test_a_path_that_is_missing_or_a_file_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.zeros(3))

    with pytest.raises(DataError, match=r"none/train: no such folder"):
        read(tmp_path / "none")
    with pytest.raises(DataError, match=r"a\.npz: a file; this recipe reads a folder"):
        read(tmp_path / "a.npz")


def broken(what: str) -> bytes:
    file = io.BytesIO()
    mode, kind = ("I;16", "PNG") if what == "16 bits" else ("RGB", "JPEG")
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    picture = Pillow.new("I;16", (40, 40)) if mode == "I;16" else Pillow.fromarray(noise)
    picture.save(file, "GIF" if what == "gif" else kind)
    content = file.getvalue()
    return {"text": b"not a picture", "empty": b"", "cut": content[:-300]}.get(what, content)


@pytest.mark.parametrize("what", ["text", "empty", "cut", "gif", "16 bits"])
def test_a_broken_picture_is_named_before_training_if_it_scores(tmp_path: Path, what: str) -> None:
    root = write_folders(tmp_path / "data", {"train": 3, "val": 2})
    (root / "val" / "bee" / "01.jpg").write_bytes(broken(what))

    with pytest.raises(
        PictureError, match=r"data/val/bee/01\.jpg: (not a whole PNG|has more than)"
    ):
        read(root)


def test_a_broken_picture_is_named_when_training_reads_it(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", {"train": 6, "val": 2})
    (root / "train" / "cow" / "02.PNG").write_bytes(broken("cut"))
    data = read(root, validation=1)

    with pytest.raises(PictureError, match=r"train/cow/02\.PNG: not a whole PNG or JPEG picture"):
        list(data.train.augmented(torch.split(torch.arange(len(data.train)), 4)))
