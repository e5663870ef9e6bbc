"""Pruning: what was used last stays, however old it is."""

import os
from pathlib import Path

import pytest

from server.pruning import mark_used, prune


def aged(parent: Path, names: str) -> None:
    """Make directories, each a minute older than the next."""
    for i, name in enumerate(names):
        (parent / name).mkdir(parents=True)
        (parent / name / "file").write_text(name)
        os.utime(parent / name, (60 * i, 60 * i))


def left(parent: Path) -> str:
    return "".join(sorted(path.name for path in parent.iterdir()))


def test_the_oldest_go(tmp_path: Path) -> None:
    aged(tmp_path, "abcd")

    prune(tmp_path, keep=2)

    assert left(tmp_path) == "cd"


def test_what_is_used_again_stays(tmp_path: Path) -> None:
    aged(tmp_path, "abcd")

    mark_used(tmp_path / "a")
    prune(tmp_path, keep=2)

    assert left(tmp_path) == "ad"


def test_files_and_links_are_left_alone(tmp_path: Path) -> None:
    aged(tmp_path / "in", "ab")
    (tmp_path / "in" / "note").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")

    prune(tmp_path / "in", keep=0)

    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["link", "note"]
    assert (tmp_path / "elsewhere").is_dir()


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_nothing_to_prune_is_no_error(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("")

    prune(tmp_path / parent, keep=1)
    mark_used(tmp_path / parent / "a")

    assert (tmp_path / "file").read_text() == ""
