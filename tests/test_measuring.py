"""What is known of a host before anything is measured on it."""

from pathlib import Path

import pytest

from maestro_core.artifact import Artifact
from server import measuring
from server.engine import Engine
from server.huge_pages import When
from server.measuring import HostModel
from server.settings import Settings


@pytest.mark.parametrize(
    ("cores", "threads", "takes_all"), [(1, 1, True), (2, 2, True), (2, 1, False), (4, 2, False)]
)
def test_computing_takes_all_cores_unless_threads_leave_one(
    tiny_artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    threads: int,
    takes_all: bool,
) -> None:
    monkeypatch.setattr(measuring, "usable_cores", lambda _workers: cores)
    host = HostModel(tiny_artifact, Settings(state_dir=tmp_path))

    engine = Engine(tiny_artifact, intra_op_threads=threads)

    assert host.takes_all_cores(engine) is takes_all


@pytest.mark.parametrize(
    ("wish", "workers", "asked"),
    [("auto", 1, "auto"), ("auto", 2, "never"), ("always", 2, "always"), ("never", 1, "never")],
)
def test_workers_share_one_file_unless_told_otherwise(
    tiny_artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wish: When,
    workers: int,
    asked: When,
) -> None:
    given: list[When] = []

    def engine(*_: object, huge_pages: When, **_others: object) -> None:
        given.append(huge_pages)

    monkeypatch.setattr(measuring, "Engine", engine)

    HostModel(tiny_artifact, Settings(state_dir=tmp_path, huge_pages=wish), workers).engine(
        tiny_artifact, threads=1
    )

    assert given == [asked]
