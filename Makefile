# Everything a fresh machine needs is Python 3.11, 3.12 or 3.13 and the package index.
PYTHON ?= python3.11
NEWEST ?= python3.13
VENV ?= .venv
BIN := $(VENV)/bin
LOCK ?=# .ci/requirements.lock: install the versions of CI in place of today's
PIP = $(BIN)/pip install --quiet $(LOCK:%=-c %)
export HF_HUB_OFFLINE ?= 1

.PHONY: help quickstart quickstart-smollm2 test test-long test-lowest test-newest lock audit lint bench gpu-wheels clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 22

# The environment is built once and again only when pyproject.toml changes.
$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(PIP) -e '.[gguf]'
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) -e '.[test]'
	@touch $@

quickstart: $(VENV)/.run ## distil the embedded student on two CPU cores (minutes, no downloads)
	$(BIN)/python -m dcod_jax.train --config quickstart

models/SmolLM2-135M-Instruct-24L: | $(VENV)/.run
	$(BIN)/python tools/get_smollm2.py --layers 24

quickstart-smollm2: models/SmolLM2-135M-Instruct-24L ## the same path on the real SmolLM2-135M-Instruct
	$(BIN)/python -m dcod_jax.train --config quickstart_smollm2

test: $(VENV)/.test lint ## environment and the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(VENV)/.test models/SmolLM2-135M-Instruct-24L ## the long forms: the real SmolLM2-135M, whole data files
	$(BIN)/python -m pytest -m long

test-lowest: ## the suite on the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet uv
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest --resolution lowest-direct -e '.[test]'
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-newest: ## the suite on Python 3.13 and today's versions; in a Debian 13 root where 3.13 is not here
	@$(NEWEST) --version || exec tools/debian13.sh make test-newest NEWEST=python3; \
	set -ex; $(NEWEST) -m venv $(VENV)-newest; \
	$(VENV)-newest/bin/pip install --quiet --upgrade pip; \
	$(VENV)-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager -e '.[test]'; \
	$(VENV)-newest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lock: $(VENV)/.test ## write the versions of CI, today's for Python 3.11 to 3.13, to .ci/requirements.lock
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet pyproject.toml --extra test --universal --python-version 3.11 \
	  --upgrade --no-annotate --custom-compile-command 'make lock' --output-file .ci/requirements.lock

audit: $(VENV)/.test ## known vulnerabilities in the versions of CI; needs the index's advisories
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit --strict --disable-pip --no-deps -r .ci/requirements.lock

lint: $(VENV)/.test ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pyright

gpu-wheels: $(VENV)/.run ## what tools/gpu_check.sh needs beside JAX, torch and transformers, as wheels
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: -c .ci/requirements.lock \
	  -d build/gpu_wheels ml_collections

clean: ## remove the environments and what the quickstarts wrote; other runs and models stay
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest runs/quickstart* models/SmolLM2-135M-Instruct*
