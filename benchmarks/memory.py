"""Memory of loaded points, measured by a process of their own: `python -m benchmarks.memory`."""

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import onnx
import onnxruntime as ort

from maestro_core import artifact
from server.engine import Engine, session_options, trim_heap

Way = Literal["alone", "always", "never"]  # exported alone, or an engine with huge pages or none


def grown_mib(path: Path, way: Way, points: int, batch: int, state_dir: Path) -> dict[str, float]:
    """Return what a new process grows by, MiB, when it loads the dearest `points` and runs each.

    alone: each as a file of its own with its weights inside, as exported without us; else all of
    them in one engine, with huge pages always or never.
    Keys: private, private_dirty (not backed by a file), pss (a page mapped k times counts 1/k), rss
    (each time whole).
    """
    arguments = (str(path), way, str(points), str(batch), str(state_dir))
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-P", "-m", "benchmarks.memory", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return cast(dict[str, float], json.loads(done.stdout))


def inline(model: artifact.Artifact, point: int, state_dir: Path) -> Path:
    """Return a point as a file of its own with its weights inside, made where it is missing."""
    path = state_dir / "alone" / model.digest[:16] / f"{point:02}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(onnx.load(model.graph_path(point)), path)
    return path


def main() -> None:
    """Print by how much this process grows, as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("way", choices=get_args(Way))
    parser.add_argument("points", type=int)
    parser.add_argument("batch", type=int)
    parser.add_argument("state_dir", type=Path)
    chosen = parser.parse_args()
    model = artifact.load(chosen.path)
    last = len(model.points)
    x = np.ones((chosen.batch, *model.manifest.input.shape[1:]), np.float32)
    points = range(last - chosen.points, last)
    before = mapped_mib()
    if chosen.way == "alone":
        paths = [inline(model, point, chosen.state_dir) for point in points]
        sessions = [ort.InferenceSession(path, session_options(1)) for path in paths]
        for session in sessions:
            session.run(None, {model.manifest.input.name: x})
    else:
        engine = Engine(model, state_dir=chosen.state_dir, huge_pages=chosen.way)
        for point in points:
            engine.run(x, point)
    gc.collect()
    trim_heap()  # for both ways alike
    after = mapped_mib()
    print(json.dumps({name: round(after[name] - before[name], 1) for name in after}))


def mapped_mib(pid: int | str = "self") -> dict[str, float]:
    """Return the memory of a process in MiB, by the keys of `grown_mib`."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    mib: dict[str, Any] = {}
    for line in text.splitlines()[1:]:
        name, value, *_ = line.split()
        mib[name.rstrip(":")] = int(value) / 1024
    private = mib["Private_Clean"] + mib["Private_Dirty"]
    return {
        "private": private,
        "private_dirty": mib["Private_Dirty"],
        "pss": mib["Pss"],
        "rss": mib["Rss"],
    }


if __name__ == "__main__":
    main()
