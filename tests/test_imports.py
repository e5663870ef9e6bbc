"""The walls of docs/architecture.md, held against the code's own import statements."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# module -> what it must not import, at its top or anywhere inside
WALLS = {
    "maestro_core/artifact.py": {"torch", "server", "benchmarks", "onnxruntime"},
    "maestro_core/graph.py": {"torch", "server", "benchmarks", "onnxruntime"},
    "maestro_core/frontier.py": {"torch", "server", "benchmarks", "onnxruntime"},
    "maestro_core/writing.py": {"torch", "server", "benchmarks", "onnxruntime"},
    "maestro_core/profile.py": {"torch", "server", "benchmarks", "onnxruntime"},
    "maestro_core/lod.py": {"server", "benchmarks", "maestro_core.export", "maestro_core.search"},
    "maestro_core/layers.py": {"server", "benchmarks"},
    "maestro_core/training.py": {"server", "benchmarks"},
    "maestro_core/search.py": {"server", "benchmarks"},
    "maestro_core/export.py": {"server", "benchmarks"},
    "server/policy_names.py": {"maestro_core", "server", "benchmarks", "pydantic"},
    "server/selector.py": {"asyncio", "time", "threading", "fastapi", "onnxruntime"},
    "server/scheduler.py": {"asyncio", "time", "threading", "fastapi", "server.engine"},
    "maestro_core/held_out.py": {"torch", "server", "benchmarks", "onnxruntime"},
    "benchmarks/profiler.py": {"fastapi", "torch"},
    "benchmarks/effort.py": {"server", "onnxruntime"},
    "server/processes/hub.py": {"fastapi", "uvicorn", "server.engine", "onnxruntime"},
    "benchmarks/host_artifact.py": {"fastapi", "torch"},
    "benchmarks/host_points.py": {"fastapi", "torch"},
}


def imported(path: Path) -> set[str]:
    """Return every module that a file imports, with the packages above it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {
        ".".join(name.split(".")[: i + 1]) for name in names for i in range(name.count(".") + 1)
    }


@pytest.mark.parametrize("module", WALLS)
def test_a_module_keeps_to_its_side(module: str) -> None:
    assert imported(ROOT / module) & WALLS[module] == set()


@pytest.mark.parametrize("path", sorted((ROOT / "server").glob("**/*.py")), ids=lambda p: p.name)
def test_no_module_of_the_server_names_torch(path: Path) -> None:
    assert "torch" not in imported(path)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/simulator").glob("*.py")), ids=lambda p: p.name
)
def test_the_simulator_knows_neither_clocks_nor_http(path: Path) -> None:
    assert imported(path) & {"time", "datetime", "asyncio", "fastapi"} == set()


def test_no_module_imports_pickle() -> None:
    packages = [ROOT / name for name in ("maestro_core", "server", "benchmarks")]
    guilty = [p for root in packages for p in root.rglob("*.py") if "pickle" in imported(p)]

    assert guilty == []


def test_one_module_flushes_and_renames() -> None:
    packages = [ROOT / name for name in ("maestro_core", "server", "benchmarks")]
    calls = re.compile(r"\bfsync\(|\.rename\(")
    found = [p.name for r in packages for p in r.rglob("*.py") if calls.search(p.read_text())]

    assert found == ["writing.py"]


@pytest.mark.parametrize("module", ["server.app", "benchmarks.profiler", "maestro_core.cli"])
def test_importing_the_serving_path_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"

    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)

    assert finished.returncode == 0


@pytest.mark.parametrize("absent", ["onnxruntime", "fastapi", "uvicorn"])
def test_the_supervisor_of_workers_loads_neither_runtime_nor_http(absent: str) -> None:
    code = f"import sys, server.processes.supervisor; sys.exit({absent!r} in sys.modules)"

    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)

    assert finished.returncode == 0
