# Every target makes what it needs: .venv is built once and again only when the pins or the project change.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help install demo test test-slow fuzz test-gpu lint format compare bench bench-storage bench-kernels bench-cache bench-engines bench-train bench-audit clean
help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

$(READY): pyproject.toml setup.py storage/unpack.c storage/pack.c kernels/sample/rows.c constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(READY)   ## create .venv with the pinned set

demo: $(READY)      ## teacher -> cache -> audit line -> students -> table, on Python's own sources (about 6 minutes)
	$(BIN)/stillroom demo --out runs/demo

# Two files of tests at a time; torch's own threads would only fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test: $(READY)      ## the default test suite
	$(PYTEST) -n 2 --dist loadfile

test-slow: $(READY) ## the long tests, Ray's too where it has a wheel
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ray
	$(PYTEST) -n 2 --dist loadfile -m "slow and not gpu" --timeout 1800

fuzz: $(READY)      ## ten minutes of hostile caches (SECONDS=600); guided by coverage where atheris has a wheel
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt atheris
	$(BIN)/python tests/storage/fuzz.py --seconds $(or $(SECONDS),600)

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu --timeout 1800

lint: $(READY)      ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)    ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compare: $(READY)   ## the paper's experiment in small (up to an hour on two cores): docs/benchmarks/compare.*
	$(BIN)/python -m benchmarks.compare

bench: bench-storage bench-kernels bench-cache bench-engines bench-train bench-audit

bench-storage: $(READY) ## bytes per row, rates of writing, reading and loading: docs/benchmarks/storage.*
	$(BIN)/python -m benchmarks.storage

bench-kernels: $(READY) ## loss and sampler times: docs/benchmarks/kernels.*
	$(BIN)/python -m benchmarks.kernels

bench-cache: $(READY) ## stage one against the teacher's bare forward: docs/benchmarks/cache.*
	$(BIN)/python -m benchmarks.cache

bench-engines: $(READY) ## two processes against one: docs/benchmarks/engines.*
	$(BIN)/python -m benchmarks.engines

bench-train: $(READY) ## a training step from a cache against one from the text: docs/benchmarks/train.*
	$(BIN)/python -m benchmarks.train

bench-audit: $(READY) ## false alarms and power of the audit (about 20 minutes): docs/benchmarks/audit.*
	$(BIN)/python -m benchmarks.audit

clean:              ## remove the environment and caches, keep runs/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info build dist
