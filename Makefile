# Set-up takes one time; afterwards each target starts in seconds.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint bench clean

help:
	@echo "make setup      the virtual environment $(VENV) with everything in it"
	@echo "make demo       the whole main job on shipped photos, about five minutes on two cores"
	@echo "make test       the tests of every day"
	@echo "make test-slow  kills, signals and whole runs as well"
	@echo "make lint       ruff and pyright"
	@echo "make bench      every figure that README quotes; NAFNET_DATA names a folder of photos"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== Installing into $(VENV): about 3.3 GB, a few minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "== Installed"

demo: setup
	@echo "== Running the demo; --help of $(BIN)/nafnet shows what else there is"
	@$(BIN)/nafnet demo

test: setup
	@echo "== Testing"
	@$(BIN)/python -m pytest

test-slow: setup
	@echo "== Testing, the slow ones too"
	@$(BIN)/python -m pytest -m "not gpu"

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

bench: setup
	@$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache
