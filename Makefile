# Each target does all its own set-up: a virtual environment in .venv, then its job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One BLAS thread: see enmp_jax/__init__.py
export OPENBLAS_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-reference check demo-train docs suites

demo: $(VENV)/.base
	$(BIN)/enmp demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -rs --ignore=tests/reference

test-reference: $(VENV)/.reference
	$(BIN)/python -m pytest -n 2 -rs tests/reference

check: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# The page of all run-file keys, after a change of enmp_jax/config/sections.py.
docs: $(VENV)/.base
	$(BIN)/python -m enmp_jax.config.reference > docs/run-file.md

demo-train: $(VENV)/.base
	$(BIN)/enmp train enmp_jax/suites/demo.yaml --out runs/demo-train

# Base and experts of vision-small again, as good as the package's but not equal in bits (see
# benchmarks/results/suites.md); TFDS_DATA_DIR says where its data are.
suites: $(VENV)/.base
	$(BIN)/enmp train enmp_jax/suites/vision-small.yaml --out runs/vision-small-train

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.base: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e ".[test]"
	touch $@ $(VENV)/.base

# torch from a CPU build where one is at hand: set TORCH to the requirement to install first.
TORCH ?= torch==2.13.0
$(VENV)/.reference: $(VENV)/.test
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[test,reference]"
	touch $@
