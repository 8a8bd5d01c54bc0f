# make demo · make test · make lint · make bench-NAME · make docs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_STAMP := $(VENV)/.installed-demo
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint docs clean
.DEFAULT_GOAL := demo

# torch first and pinned: an unpinned torch brings gigabytes of CUDA. A stamp is renewed when the requirements change, and
# nothing is asked of the network while it is newer than they are.
$(DEMO_STAMP): pyproject.toml constraints.txt requirements-embedded.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[embedded]'
	$(PIP) install --quiet --no-deps --requirement requirements-embedded.txt
	@touch $@

$(STAMP): $(DEMO_STAMP)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(DEMO_STAMP)
	$(BIN)/residency demo

test: $(STAMP)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check --no-cache --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

bench-%: $(STAMP)
	$(BIN)/python benchmarks/$*.py

docs: $(STAMP)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/generate.py
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
