# Each target makes the environment that it needs; nothing has to be done before.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

LOCK := --quiet --constraint constraints.txt --generate-hashes --python-version 3.11 --universal --no-header

COMPILED := $(VENV)-compiled
SOURCES := $(shell find maestro_core server benchmarks -type f -not -name '*.pyc' -not -path 'benchmarks/results/*')
# The tests of what is compiled, and of what builds on it.
COMPILED_TESTS := $(patsubst %,tests/test_%.py,compiled app bodies calibration connections direct dispatcher \
  forecast fuzz hostile_clients inputs json_numbers measuring metrics outlook patience pictures protocol scheduler \
  schemas selector server_policies simulator tracing unforeseen waiting)

.PHONY: serve test slow fuzz clients compiled audit lint lock clean

serve: $(VENV)/.serve  ## install what serving needs (no torch) and start the server
	$(BIN)/maestro serve

test: $(VENV)/.dev  ## install everything and run the tests
	$(BIN)/pytest

slow: $(VENV)/.dev  ## the tests that take longer: theory, whole runs
	$(BIN)/pytest -m slow

fuzz: $(VENV)/.dev  ## what `make test` sends of wrong requests, a hundred times over
	MAESTRO_FUZZ_CASES=1000 $(BIN)/pytest tests/test_fuzz.py

clients: $(VENV)-clients/.installed  ## the clients of others, which pin what we don't, against our server
	$(VENV)-clients/bin/pytest -p no:cacheprovider tests/test_clients.py

# From a directory without the sources, which would be imported in the place of what is installed.
compiled: $(COMPILED)/.installed  ## the server compiled, in an environment of its own, and its tests
	rm -rf $(COMPILED)/run && mkdir $(COMPILED)/run
	cp -r tests examples pyproject.toml $(COMPILED)/run
	cd $(COMPILED)/run && MAESTRO_EXPECT_COMPILED=1 ../bin/pytest -p no:cacheprovider $(COMPILED_TESTS)

audit: | $(BIN)/python  ## known vulnerabilities in what the image installs (needs the network)
	$(BIN)/pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --strict --disable-pip --requirement deploy/requirements.lock

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: | $(BIN)/python  ## pin what the image installs, with hashes (needs the network)
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	printf '# the serving dependencies of pyproject.toml, as tested, with hashes. Made by '"'make lock'"'.\n' >deploy/requirements.lock
	$(BIN)/uv pip compile pyproject.toml $(LOCK) >>deploy/requirements.lock
	printf '# what builds the package (hatchling, mypyc), as tested, with hashes. Made by '"'make lock'"'.\n' >deploy/build.lock
	printf 'hatchling\nhatch-mypyc\n' | $(BIN)/uv pip compile - --no-annotate $(LOCK) >>deploy/build.lock

clean:
	rm -rf $(VENV) $(VENV)-clients $(COMPILED) .mypy_cache .ruff_cache .pytest_cache build dist

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Maestro needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)-clients/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/pip install --quiet --disable-pip-version-check -e . pytest hypothesis httpx2 'tritonclient[http]' kserve
	touch $@

$(COMPILED)/.tools: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(COMPILED)
	$(COMPILED)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt hatchling hatch-mypyc '.[bench,tracing,dev]'
	$(COMPILED)/bin/pip uninstall --quiet --yes maestro-serve
	touch $@

# Built in a copy: beside the sources, extension modules would hide what is changed there later.
$(COMPILED)/.installed: $(COMPILED)/.tools README.md LICENSE $(SOURCES)
	rm -rf $(COMPILED)/src && mkdir $(COMPILED)/src
	cp -r pyproject.toml README.md LICENSE maestro_core server benchmarks $(COMPILED)/src
	HATCH_BUILD_HOOKS_ENABLE=1 $(COMPILED)/bin/pip install --quiet --disable-pip-version-check \
	  --force-reinstall --no-deps --no-build-isolation $(abspath $(COMPILED))/src
	rm -rf $(COMPILED)/src
	touch $@

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,bench,tracing,dev]'
	touch $@ $(VENV)/.serve
