"""SIGKILL at any moment: what was written last is whole, and the next start finds it."""

import random
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest

from maestro_core import artifact
from maestro_core.artifact import Artifact
from maestro_core.profile_store import ProfileStore
from tests.server_process import running_server, server_process
from tests.test_profile import PROFILE

KILLS = 3
PROFILE_WRITER = """
import sys
from pathlib import Path
from maestro_core.profile import Profile
from maestro_core.profile_store import ProfileStore
store = ProfileStore(Path(sys.argv[1]))
profile = Profile.from_json(sys.argv[2])
while True:
    store.save(profile)
    print("saved", flush=True)
"""
ARTIFACT_WRITER = """
import sys
from pathlib import Path
from maestro_core import artifact
path = Path(sys.argv[1])
found = artifact.load(path)
contents = {name: (path / name).read_bytes() for name in found.manifest.files}
while True:
    artifact.save(path, found.manifest, contents)
    print("saved", flush=True)
"""


def kill_while_writing(program: str, *arguments: str, seed: int) -> None:
    """Run a program that writes over and over; kill it up to 50 ms after its first file."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"saved\n"
        time.sleep(random.Random(seed).uniform(0, 0.05))
        writer.kill()


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_profile_is_whole_whenever_its_writer_dies(seed: int, tmp_path: Path) -> None:
    kill_while_writing(PROFILE_WRITER, str(tmp_path), PROFILE.to_json(), seed=seed)

    assert ProfileStore(tmp_path).find(PROFILE.key).profile == PROFILE


@pytest.mark.parametrize("seed", range(KILLS))
def test_an_artifact_is_whole_whenever_its_writer_dies(seed: int, tiny_artifact: Artifact) -> None:
    kill_while_writing(ARTIFACT_WRITER, str(tiny_artifact.path), seed=seed)

    assert artifact.load(tiny_artifact.path).manifest == tiny_artifact.manifest


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two directories")
def test_an_artifact_is_replaced_in_one_step(
    tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of the old one is never renamed away: a kill could come between."""
    renamed: list[Path] = []
    rename = Path.rename

    def note(path: Path, target: Path) -> Path:
        renamed.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", note)
    contents = {
        name: (tiny_artifact.path / name).read_bytes() for name in tiny_artifact.manifest.files
    }

    artifact.save(tiny_artifact.path, tiny_artifact.manifest, contents)

    assert tiny_artifact.path not in renamed


def test_a_server_killed_while_it_calibrates_starts_again_from_its_last_profile(
    tiny_artifact: Artifact, tmp_path: Path
) -> None:
    with server_process(tmp_path, tiny_artifact.path, MAESTRO_CALIBRATION_BUDGET_S="1") as (
        address,
        process,
    ):
        calibrate_once_the_first_has_ended(address)
        (stored,) = tmp_path.rglob("profile.json")
        before = stored.read_bytes()
        process.kill()
        process.wait()

    with running_server(tmp_path, tiny_artifact.path) as address:
        assert httpx.get(f"{address}/readyz").status_code == 200
    assert stored.read_bytes() == before
    assert not list(tmp_path.rglob("*.unusable"))


def calibrate_once_the_first_has_ended(address: str) -> None:
    """Start a calibration. The first hands its profile over, and so makes the server ready, before
    it stores it."""
    give_up_s = time.monotonic() + 30.0
    while (started := httpx.post(f"{address}/profile", json={})).status_code == 409:
        assert time.monotonic() < give_up_s
        time.sleep(0.01)
    assert started.status_code == 202
