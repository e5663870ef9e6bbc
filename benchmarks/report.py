"""What every result says of where it comes from, and how it is written."""

import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from maestro_core.host import Host

RESULTS = Path(__file__).parent / "results"


def conditions() -> dict[str, Any]:
    """Return host, date, versions and commit ("unknown" outside a checkout)."""
    packages = ("maestro-serve", "numpy", "onnx", "onnxruntime")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": asdict(Host.here()),
        "versions": {package: version(package) for package in packages},
        "commit": _commit(),
    }


def write(result: Mapping[str, Any], path: Path | None) -> None:
    """Print a result as one JSON object, and write it where a path is given."""
    text = json.dumps(result, indent=1)
    print(text)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


class Elsewhere:
    """The share of the host's cores that others use, from its making until asked (Linux)."""

    def __init__(self) -> None:
        self._began = self._seconds()

    def share(self) -> float:
        """Return 0 on a quiet host, 1 on one that others fill."""
        total_s, foreign_s = (
            now - then for now, then in zip(self._seconds(), self._began, strict=True)
        )
        return round(max(0.0, foreign_s) / total_s, 3)

    def _seconds(self) -> tuple[float, float]:
        """Return core-seconds since boot, and those that other processes computed."""
        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
        total, idle = sum(map(int, fields)), int(fields[3]) + int(fields[4])
        tick_s = 1 / os.sysconf("SC_CLK_TCK")
        return total * tick_s, (total - idle) * tick_s - time.process_time()


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
