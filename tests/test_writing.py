"""What is written: whole, on the disk before it is seen, and gone where it could not be."""

import os
from pathlib import Path

import pytest

from maestro_core import writing


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the inodes that were flushed, as they are."""
    inodes: list[int] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        inodes.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return inodes


def no_space(_descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_file_is_replaced_and_both_it_and_its_name_are_on_the_disk(
    tmp_path: Path, flushed: list[int]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before, and longer")

    writing.write_atomically(path, b"now")

    assert path.read_bytes() == b"now"
    assert flushed == [path.stat().st_ino, tmp_path.stat().st_ino]
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_they_could_read_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").write_bytes(b"")

    writing.write_atomically(tmp_path / "file", b"now")

    assert (tmp_path / "file").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_disk_that_is_full_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", no_space)

    with pytest.raises(OSError, match="No space left"):
        writing.write_atomically(path, b"now")

    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_takes_the_place_of_another(tmp_path: Path, flushed: list[int]) -> None:
    old, new = tmp_path / "directory", tmp_path / ".new"
    for directory, name in ((old, "a"), (new, "b")):
        directory.mkdir()
        (directory / name).write_bytes(b"")

    writing.replace_directory(new, old)

    assert [path.name for path in old.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [old]
    assert flushed[-1] == tmp_path.stat().st_ino


def test_a_file_system_that_flushes_no_directories_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == tmp_path.stat().st_ino:
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)

    writing.write_atomically(tmp_path / "file", b"now")

    assert (tmp_path / "file").read_bytes() == b"now"
