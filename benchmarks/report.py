"""What every result says of where it comes from, and how it is written."""

import json
import math
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from maestro_core.host import Host

RESULTS = Path(__file__).parent / "results"


def conditions() -> dict[str, Any]:
    """Return host, date, versions, whether the server is compiled, and the commit ("unknown"
    outside a checkout)."""
    packages = ("maestro-serve", "numpy", "onnx", "onnxruntime")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": asdict(Host.here()),
        "versions": {package: version(package) for package in packages},
        "compiled": _is_compiled(),
        "commit": _commit(),
    }


def place(name: str, out: Path | None, *, quick: bool) -> Path | None:
    """Return where a result is written: `out`, else its place in `results/`, which a quick one does
    not take."""
    return out or (None if quick else RESULTS / name)


def write(result: Mapping[str, Any], path: Path | None) -> None:
    """Print a result as one JSON object, and write it where a path is given.

    Numbers have six significant digits, those that JSON lacks (NaN, infinity) are null, and a row
    of a table has one line.
    """
    text = _text(_rounded(result))
    print(text)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:  # noqa: ANN401  any JSON
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value


def _text(result: Mapping[str, Any]) -> str:
    lines = []
    for name, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"


def _is_compiled() -> bool:
    found = find_spec("server.scheduler")
    return bool(found and found.origin and found.origin.endswith(tuple(EXTENSION_SUFFIXES)))


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
