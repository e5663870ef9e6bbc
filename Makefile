# Each target makes the environment that it needs; nothing has to be done before.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

LOCK := --quiet --constraint constraints.txt --generate-hashes --python-version 3.11 --universal --no-header

.PHONY: serve test slow fuzz clients audit lint lock clean

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
	printf '# what builds the package (hatchling), as tested, with hashes. Made by '"'make lock'"'.\n' >deploy/build.lock
	echo hatchling | $(BIN)/uv pip compile - --no-annotate $(LOCK) >>deploy/build.lock

clean:
	rm -rf $(VENV) $(VENV)-clients .mypy_cache .ruff_cache .pytest_cache build dist

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Maestro needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)-clients/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/pip install --quiet --disable-pip-version-check -e . pytest hypothesis httpx2 'tritonclient[http]' kserve
	touch $@

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,bench,tracing,dev]'
	touch $@ $(VENV)/.serve
