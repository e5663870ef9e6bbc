"""What ships: pinned dependencies, the image's recipe, and manifests that their schemas accept."""

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from maestro_core.artifact import Artifact
from server.metrics import Metrics
from server.running import GRACE_S
from server.service import DRAIN_S
from server.settings import Settings, read_settings
from tests.server_process import running_server

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+?)(?: ;.*)? \\$", re.MULTILINE)


def pins(path: Path) -> dict[str, str]:
    """Return version by name; a name has two where platforms differ, and then the first counts."""
    found: dict[str, str] = {}
    for name, version in PIN.findall(path.read_text()):
        found.setdefault(name.lower().replace("_", "-"), version)
    return found


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_the_lock_holds_what_serving_needs_as_it_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=]", line)[0].lower() for line in project["dependencies"]}
    locked, tested = pins(DEPLOY / "requirements.lock"), constraints()

    assert needed <= locked.keys()
    differ = {name for name, version in locked.items() if tested.get(name, version) != version}
    assert differ == set(), "run 'make lock'"


@pytest.mark.parametrize("name", ["requirements.lock", "build.lock"])
def test_every_pin_has_its_hash_and_none_is_torch(name: str) -> None:
    text = (DEPLOY / name).read_text()
    entries = [part for part in re.split(r"\n(?=[a-z])", text, flags=re.I) if "==" in part]

    assert len(entries) == len(PIN.findall(text)) > 0
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "torch" not in pins(DEPLOY / name)


def test_the_image_installs_from_the_locks_and_runs_as_nobody_much() -> None:
    recipe = (ROOT / "Dockerfile").read_text()
    installs = re.findall(r"pip install (?:(?!&&).)*", recipe, re.DOTALL)

    for line in installs:
        assert "--require-hashes -r" in line or "--no-deps" in line, line
    assert re.search(r"^USER maestro$", recipe, re.MULTILINE)


def health(port: str) -> "subprocess.CompletedProcess[str]":
    """Run the image's health check where the setting of the port is this."""
    (text,) = re.findall(
        r"^HEALTHCHECK .*?CMD (\[.*?\])$",
        (ROOT / "Dockerfile").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    _, *arguments = json.loads(text)
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"MAESTRO_PORT": port},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_image_is_healthy_while_it_is_ready_on_the_port_of_its_settings(
    tmp_path: Path, tiny_artifact: Artifact
) -> None:
    with running_server(tmp_path, tiny_artifact.path, MAESTRO_CALIBRATION_BUDGET_S="1") as address:
        assert health(address.rpartition(":")[2]).returncode == 0
    # An empty variable is not set, as for the server itself: what the check finds there is its own.
    assert "ValueError" not in health("").stderr


def test_licences_of_what_is_vendored_go_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {path for pattern in project["license-files"] for path in ROOT.glob(pattern)}
    static = ROOT / "server" / "static"
    vendored = {path.parent for path in static.glob("*-*.*.*/*.js")}

    assert len(vendored) == 2
    for folder in vendored:
        notices = {path for path in folder.iterdir() if re.search("LICENSE|NOTICE", path.name)}
        assert notices
        assert notices <= listed


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def container() -> dict[str, Any]:
    every = [document for path in KUBERNETES for document in documents(path)]
    (deployment,) = [document for document in every if document["kind"] == "Deployment"]
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_kubernetes_accepts_the_manifests(path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")

    for document in documents(path):
        if document["apiVersion"].startswith("keda.sh/"):
            continue  # a custom resource: its schema is not Kubernetes' own
        validate.validate(document, validate.latest_version(), strict=True)


def test_compose_accepts_its_file() -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]

    finished = subprocess.run(
        [*command, str(DEPLOY / "compose.yaml")], capture_output=True, text=True, check=False
    )

    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_settings_that_the_manifests_give_exist() -> None:
    (service,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values()
    given = {*service["environment"], *(entry["name"] for entry in container()["env"])}

    assert {name.removeprefix("MAESTRO_").lower() for name in given} <= set(Settings.model_fields)


def test_a_pod_has_longer_to_end_than_it_drains_and_to_start_than_it_measures() -> None:
    (deployment,) = [d for path in KUBERNETES for d in documents(path) if d["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    drain_s = float(next(e["value"] for e in container()["env"] if e["name"] == "MAESTRO_DRAIN_S"))
    startup = container()["startupProbe"]

    assert pod["terminationGracePeriodSeconds"] > drain_s + GRACE_S + DRAIN_S
    budget_s = Settings.model_fields["calibration_budget_s"].default
    assert startup["periodSeconds"] * startup["failureThreshold"] > 3 * budget_s


def test_a_container_can_write_to_its_volumes_alone() -> None:
    assert container()["securityContext"]["readOnlyRootFilesystem"] is True
    (service,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values()
    assert service["read_only"] is True


def test_scaling_asks_for_a_metric_that_the_server_has() -> None:
    (scaled,) = [d for path in KUBERNETES for d in documents(path) if d["kind"] == "ScaledObject"]
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    (metric,) = re.findall(r"maestro_\w+", query)

    assert f"\n{metric} 0.0" in Metrics().text().decode()


def test_scaling_looks_at_the_pods_of_its_own_deployment_alone() -> None:
    (scaled,) = [d for path in KUBERNETES for d in documents(path) if d["kind"] == "ScaledObject"]
    (pod,) = re.findall(r'pod=~"([^"]*)"', scaled["spec"]["triggers"][0]["metadata"]["query"])

    assert re.fullmatch(pod, "maestro-7d4b9c6f5d-x2v8q")
    assert not re.fullmatch(pod, "maestro-c7i-7d4b9c6f5d-x2v8q")


def test_kubernetes_sets_no_variable_that_reads_as_a_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (deployment,) = [d for path in KUBERNETES for d in documents(path) if d["kind"] == "Deployment"]
    monkeypatch.setenv("MAESTRO_PORT", "tcp://10.0.0.1:80")  # as of a service "maestro"

    with pytest.raises(ValueError, match="MAESTRO_PORT"):
        read_settings()
    assert deployment["spec"]["template"]["spec"]["enableServiceLinks"] is False


@pytest.fixture(scope="module")
def try_image() -> dict[str, Any]:
    return runpy.run_path(str(DEPLOY / "try_image.py"))


def test_an_image_is_searched_for_what_only_building_and_training_need(
    tmp_path: Path, try_image: dict[str, Any]
) -> None:
    for name in ("usr/bin/gcc", "usr/lib/site-packages/torch/a.py", "usr/share/doc/gcc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    assert try_image["found_in"](tmp_path) == ["usr/bin/gcc", "usr/lib/site-packages/torch"]


def test_an_image_is_searched_for_modules_that_are_not_compiled(
    tmp_path: Path, try_image: dict[str, Any]
) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(
        "[tool.hatch.build.targets.wheel.hooks.mypyc]\n"
        'include = ["/server/a.py", "/server/b.py", "/server/c.py"]\n'
    )
    server = tmp_path / "opt/maestro/lib/python3.11/site-packages/server"
    server.mkdir(parents=True)
    for name in ("a.py", "a.cpython-311-x86_64-linux-gnu.so", "b.py", "ab.abi3.so"):
        (server / name).touch()

    assert try_image["interpreted_in"](tmp_path, project) == ["server/b.py", "server/c.py"]


@pytest.mark.parametrize(
    "change",
    [
        {"unpacked_mb": 350.0},
        {"must_not_be_there": ["usr/bin/gcc"]},
        {"interpreted": ["server/scheduler.py"]},
        {"start_with_profile_s": 3.01},
        {"uid": 0},
        {"exit_status": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_run_that_is_shown_kept_every_limit(
    try_image: dict[str, Any], change: dict[str, Any]
) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/image.md").read_text(), re.DOTALL)
    shown = json.loads(block)

    assert try_image["keeps_its_limits"](shown)
    assert not try_image["keeps_its_limits"](shown | change)


def test_a_file_with_two_names_counts_once(tmp_path: Path, try_image: dict[str, Any]) -> None:
    (tmp_path / "a").write_bytes(bytes(3_000_000))
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    (tmp_path / "c").write_bytes(bytes(500_000))

    assert try_image["unpacked_mb"](tmp_path) == 3.5
