"""Start the server in an unpacked image, as a container engine would, and say how it did.

Root's file system is read-only, the user and the command are the image's own, and one directory
can be written to: the state. Needs root, for the mounts. Prints one JSON object; fails where a
limit is not kept. Only the standard library: this runs where the project is not installed.
"""

import datetime
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

LARGEST_MB = 350
LONGEST_START_S = 3.0
GIVE_UP_S = 120.0
NOT_IN_IT = ("torch", "gcc", "cc", "clang", "ld")

# Mounts of the server's own: they end with it.
CONTAINER = """
mount --bind "$ROOT" "$ROOT"
mount --bind "$STATE" "$ROOT$VOLUME"
mount -t proc proc "$ROOT/proc"
mount -t tmpfs tmpfs "$ROOT/tmp"
mount --rbind /dev "$ROOT/dev"
mount -o remount,ro,bind "$ROOT"
exec chroot --userspec="$OWNER" "$ROOT" /usr/bin/env -i {variables} {command}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def unpacked_mb(root: Path) -> float:
    """Return the size of all files in MB (10^6), a file with several names counted once."""
    sizes = {}
    for directory, _, names in os.walk(root):
        for name in names:
            status = Path(directory, name).lstat()
            sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values()) / 1e6


def found_in(root: Path) -> list[str]:
    """Return what must not be in an image that only serves."""
    return sorted(
        str(Path("/", directory, name).relative_to(root))
        for directory, directories, names in os.walk(root)
        for name in (*directories, *names)
        if name in NOT_IN_IT and (name == "torch" or Path(directory).name in ("bin", "sbin"))
    )


def interpreted_in(root: Path, project: Path) -> list[str]:
    """Return the modules that the project has compiled, but that are not machine code here."""
    wheel = tomllib.loads(project.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    modules = [path.strip("/") for path in wheel["hooks"]["mypyc"]["include"]]
    installed = "opt/maestro/lib/python3.*/site-packages"
    return [
        module
        for module in modules
        if not any(root.glob(f"{installed}/{module.removesuffix('.py')}.*.so"))
    ]


class Server:
    """The image's command, in a root file system that can't be written to."""

    def __init__(self, root: Path, image: dict[str, Any], state: Path) -> None:
        port = free_port()
        variables = [*image["Env"], f"MAESTRO_PORT={port}", "MAESTRO_HOST=127.0.0.1"]
        (volume,) = image["Volumes"]
        entry = next(
            line.split(":")
            for line in (root / "etc/passwd").read_text().splitlines()
            if line.startswith(f"{image['User']}:")
        )
        owner = f"{entry[2]}:{entry[3]}"
        os.chown(state, int(entry[2]), int(entry[3]))
        self.address = f"http://127.0.0.1:{port}"
        self.started_s = time.monotonic()
        script = CONTAINER.format(variables=shlex.join(variables), command=shlex.join(image["Cmd"]))
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "bash", "-euc", script],
            env=os.environ
            | {"ROOT": str(root), "STATE": str(state), "VOLUME": volume, "OWNER": owner},
            stdout=sys.stderr,
        )

    def seconds_to_ready(self) -> float:
        """Wait until it is ready; return how long that took from its start."""
        while time.monotonic() < self.started_s + GIVE_UP_S:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with status {self.process.returncode}")
            try:
                self.call("/readyz")
            except urllib.error.URLError:
                time.sleep(0.02)
            else:
                return time.monotonic() - self.started_s
        raise SystemExit(f"the server was not ready within {GIVE_UP_S:.0f} s")

    def call(self, path: str, body: bytes | None = None, media_type: str = "image/png") -> bytes:
        request = urllib.request.Request(
            self.address + path, data=body, headers={"content-type": media_type}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            content: bytes = answer.read()
            return content

    def uid(self) -> int:
        status = Path("/proc", str(self.process.pid), "status").read_text()
        return int(status.partition("\nUid:\t")[2].split()[0])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def trial(root: Path, image: dict[str, Any], picture: Path) -> dict[str, Any]:
    """Start it twice on one state directory: the second start has a stored profile."""
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as state:
        for start in ("first_start_s", "start_with_profile_s"):
            server = Server(root, image, Path(state))
            try:
                report[start] = round(server.seconds_to_ready(), 2)
                answer = json.loads(server.call("/infer?max_latency_ms=50", picture.read_bytes()))
                report["uid"] = server.uid()
                report["answer"] = {
                    name: answer[name] for name in ("labels", "point", "total_ms", "target_met")
                }
                report["exit_status"] = server.stop()
            finally:
                server.process.kill()
                server.process.wait()
        report["written"] = sorted(path.name for path in Path(state).iterdir())
    return report


def keeps_its_limits(report: dict[str, Any]) -> bool:
    """Return whether what `main` prints is within what an image may be."""
    return (
        report["unpacked_mb"] < LARGEST_MB
        and not report["must_not_be_there"]
        and not report["interpreted"]
        and report["start_with_profile_s"] <= LONGEST_START_S
        and report["uid"] != 0
        and report["exit_status"] == 0
    )


def main() -> None:
    """Try the image unpacked at the first argument: its `buildah inspect`, a place of pictures."""
    root, inspected, pictures = map(Path, sys.argv[1:])
    image = json.loads(inspected.read_text())["Docker"]["config"]
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "unpacked_mb": round(unpacked_mb(root), 1),
        "must_not_be_there": found_in(root),
        "interpreted": interpreted_in(root, Path(__file__).parents[1] / "pyproject.toml"),
        **trial(root, image, min(pictures.glob("*.png"))),
    }
    print(json.dumps(report, indent=2))
    sys.exit(0 if keeps_its_limits(report) else "a limit is not kept")


if __name__ == "__main__":
    main()
