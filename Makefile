# The README's two commands: `make run` and `make test`. Everything installs into .venv, through constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2

.PHONY: run test check bench nightly study clean

run: $(VENV)/run.stamp  ## train the default recipe and its dense twin on real text, and write a report
	$(BIN)/moestro train recipes/first.yaml --out runs/first --overwrite

test: check  ## everything that must hold, in at most ten minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) -m "not nightly"

check: $(VENV)/dev.stamp  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev.stamp  ## speed, as ratios in one run
	$(BIN)/python benchmarks/all.py

nightly: $(VENV)/dev.stamp study  ## the tests that take minutes, and the study
	$(BIN)/python -m pytest -m nightly --timeout 3600

study: $(VENV)/run.stamp  ## every causal method with three seeds at equal active parameters: about an hour; goes on if stopped
	$(BIN)/moestro study recipes/study.yaml --workers $(WORKERS) --out runs/study

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[report]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
