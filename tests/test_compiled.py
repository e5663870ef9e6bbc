"""Which modules of the server are machine code: those of pyproject.toml, or none.

`make compiled` runs the tests with what it has built, and says so in MAESTRO_EXPECT_COMPILED.
"""

import importlib
import os
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
HOOK = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["mypyc"]
IS_EXPECTED = bool(os.environ.get("MAESTRO_EXPECT_COMPILED"))


@pytest.mark.parametrize("path", HOOK["include"])
def test_a_module_is_compiled_where_the_run_says_so(path: str) -> None:
    name = path.removeprefix("/").removesuffix(".py").replace("/", ".")

    file = importlib.import_module(name).__file__

    assert file is not None
    assert file.endswith(tuple(EXTENSION_SUFFIXES)) == IS_EXPECTED, file
