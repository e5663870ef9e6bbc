"""The data file: what is read from it, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maestro_core import data
from maestro_core.artifact import Image
from maestro_core.data import Augmentation, Data, DataError, Pictures, distorted, evenly

GREY = Image("L", 4, 5, (0.5,), (0.25,))
COLOUR = Image("RGB", 4, 5, (0.1, 0.2, 0.3), (0.5, 0.25, 1.0))


def arrays(*channels: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (30, 4, 5, *channels), dtype=np.uint8),
        "y_train": rng.integers(0, 3, 30, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (10, 4, 5, *channels), dtype=np.uint8),
        "y_test": rng.integers(0, 3, 10, dtype=np.uint8),
    }


def write(path: Path, **content: Any) -> Path:
    np.savez(path, **content)
    return path


def read(path: Path, image: Image = GREY, validation: int = 10, seed: int = 0) -> Data:
    return data.load(path, image, classes=3, validation=validation, seed=seed)


def pixels_of(pictures: Pictures) -> Tensor:
    assert isinstance(pictures.pixels, Tensor)
    return pictures.pixels


def test_pixels_are_scaled_and_normalised_to_channels_first(tmp_path: Path) -> None:
    content = arrays(3)

    x, labels = read(write(tmp_path / "a.npz", **content), COLOUR).test.batch(slice(2, 7))

    expected = (content["x_test"][2:7] / 255 - COLOUR.mean) / COLOUR.std
    assert x.shape == (5, 3, 4, 5)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x.numpy(), expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    assert labels.tolist() == content["y_test"][2:7].tolist()


@pytest.mark.parametrize("column", [False, True])
def test_validation_leaves_the_training_set_and_test_is_whole(tmp_path: Path, column: bool) -> None:
    content = arrays()
    content["x_train"][:, 0, 0] = np.arange(30)  # each picture carries its number
    numbers = dict(zip(range(30), content["y_train"].tolist(), strict=True))
    if column:
        content["y_train"] = content["y_train"][:, None]

    found = read(write(tmp_path / "a.npz", **content))

    pairs = [
        (int(pixels[0, 0, 0]), int(label))
        for part in (found.train, found.validation)
        for pixels, label in zip(pixels_of(part), part.labels, strict=True)
    ]
    assert sorted(pairs) == sorted(numbers.items())
    assert (len(found.train), len(found.validation), len(found.test)) == (20, 10, 10)


def test_the_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", **arrays())

    first, same, other = (pixels_of(read(path, seed=seed).validation) for seed in (0, 0, 1))

    assert torch.equal(first, same)
    assert not torch.equal(other, same)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": None}, "'y_test' is missing; the file holds x_train, y_train, x_test"),
        ({"x_train": np.zeros((30, 4, 6), np.uint8)}, r"x_train is uint8 \(30, 4, 6\); it must"),
        ({"x_train": np.zeros((30, 4, 5, 3), np.uint8)}, r"must be uint8 \(n, 4, 5, 1\)"),
        ({"x_test": np.zeros((10, 4, 5))}, r"x_test is float64 \(10, 4, 5\)"),
        ({"x_train": np.array([np.zeros((4, 5)), np.zeros((5, 5))], object)}, "without objects"),
        ({"x_test": np.zeros((0, 4, 5), np.uint8)}, r"x_test is uint8 \(0, 4, 5\)"),
        ({"y_train": np.zeros(29, np.int64)}, r"y_train is int64 \(29,\); .* \(30,\)"),
        ({"y_train": np.zeros(30)}, "y_train is float64"),
        ({"y_test": np.full(10, 3)}, r"y_test has label 3; labels are 0\.\.2"),
        ({"y_test": np.full(10, -1)}, "y_test has label -1"),
        ({"y_test": np.full(10, 2**63 + 1, np.uint64)}, "y_test has label 9223372036854775809;"),
        ({"y_test": np.array([None] * 10)}, "without objects"),
    ],
)
def test_a_wrong_array_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = {key: value for key, value in {**arrays(), **change}.items() if value is not None}
    path = write(tmp_path / "a.npz", **content)

    with pytest.raises(DataError, match=rf"a\.npz: .*{message}"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"\x93NUMPY\x01\x00"])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"a\.npz: not an \.npz"):
        read(path)


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays())
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"a\.npz: not a readable \.npz"):
        read(path)


def test_a_truncated_or_single_array_or_missing_file_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.npz", **arrays()).read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    np.save(tmp_path / "b.npy", np.zeros(3))

    with pytest.raises(DataError, match=r"a\.npz: not an \.npz file, or only part of one"):
        read(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"b\.npy: not an \.npz"):
        read(tmp_path / "b.npy")
    with pytest.raises(DataError, match=r"c\.npz: no such file"):
        read(tmp_path / "c.npz")
    with pytest.raises(DataError, match=r"a folder; this recipe reads an \.npz file"):
        read(tmp_path)


@pytest.mark.parametrize("validation", [0, 30, 31, -1])
def test_a_validation_split_must_leave_something_to_train(tmp_path: Path, validation: int) -> None:
    path = write(tmp_path / "a.npz", **arrays())

    with pytest.raises(DataError, match=rf"30 pictures; {validation} can't"):
        read(path, validation=validation)


@pytest.mark.parametrize(("n", "size"), [(0, 5), (1, 5), (10, 5), (11, 5), (249_501, 500)])
def test_batches_are_few_and_of_about_one_size(n: int, size: int) -> None:
    batches = [range(n)[part] for part in evenly(n, size)]

    lengths = [len(batch) for batch in batches]
    assert [i for batch in batches for i in batch] == list(range(n))
    assert len(batches) == -(-n // size)
    assert all(0 <= max(lengths) - length <= 1 and length <= size for length in lengths)


def test_a_hole_is_one_square_somewhere_inside_each_picture() -> None:
    torch.manual_seed(0)
    white = torch.full((200, 6, 7, 3), 255, dtype=torch.uint8)

    changed = Augmentation(cutout=2).apply(white)

    black = (changed == 0).all(3)
    assert ((changed == 255).all(3) | black).all(), "a pixel is neither black nor as it was"
    places = [tuple(row.nonzero()[0].tolist()) for row in black]
    assert all(row[y : y + 2, x : x + 2].all() for row, (y, x) in zip(black, places, strict=True))
    assert (black.sum((1, 2)) == 4).all()
    assert set(places) == {(y, x) for y in range(5) for x in range(6)}


def test_pictures_distorted_by_nothing_are_as_they_were() -> None:
    pixels = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)

    assert torch.equal(distorted(pixels, 0.0), pixels)


def test_each_picture_is_distorted_in_its_own_way_and_by_the_generator_alone() -> None:
    one = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8)
    torch.manual_seed(1)
    first = distorted(one.expand(16, -1, -1, -1), 1.0)
    torch.manual_seed(1)
    again = distorted(one.expand(16, -1, -1, -1), 1.0)

    assert torch.equal(first, again)
    assert len(torch.unique(first, dim=0)) == 16
    assert (first.dtype, first.shape) == (torch.uint8, (16, 8, 8, 3))


def test_a_grey_picture_keeps_its_grey_in_the_middle_but_for_its_brightness() -> None:
    grey = torch.full((64, 9, 9, 3), 100, dtype=torch.uint8)

    middle = distorted(grey, 1.0)[:, 4, 4].int()

    assert ((middle >= 70 - 31) & (middle <= 130 + 31)).all()
    assert (middle == middle[:, :1]).all()
