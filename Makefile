# Everything a fresh machine needs is Python 3.11 or newer and the package index.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: help quickstart quickstart-smollm2 test test-long test-lowest lint bench clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 22

# The environment is built once and again only when pyproject.toml changes.
$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[gguf]'
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/pip install --quiet -e '.[test]'
	@touch $@

quickstart: $(VENV)/.run ## distil the embedded student on two CPU cores (minutes, no downloads)
	$(BIN)/python -m dcod_jax.train --config quickstart

models/SmolLM2-135M-Instruct-24L: | $(VENV)/.run
	$(BIN)/python tools/get_smollm2.py --layers 24

quickstart-smollm2: models/SmolLM2-135M-Instruct-24L ## the same path on the real SmolLM2-135M-Instruct
	$(BIN)/python -m dcod_jax.train --config quickstart_smollm2

test: $(VENV)/.test lint ## environment and the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: $(VENV)/.test models/SmolLM2-135M-Instruct-24L ## the long forms: the real SmolLM2-135M, whole data files
	$(BIN)/python -m pytest -m long

test-lowest: ## the suite on the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet --upgrade pip
	$(PYTHON) tools/lowest.py > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/pip install --quiet -e '.[test]' -c $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.test ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pyright

clean: ## remove the environment and everything the quickstart wrote
	rm -rf $(VENV) $(VENV)-lowest runs models
