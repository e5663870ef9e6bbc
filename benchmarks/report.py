"""What every result says of where it comes from, and how it is written."""

import json
import subprocess
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
