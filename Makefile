# One command a job, each from a bare clone: it makes .venv, installs the pinned requirements and builds the native module.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
# The first Python 3.11 or 3.12 that runs; PYTHON=/path/to/python overrides.
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f 2>/dev/null)
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo demo-maftplus test fuzz lint bench aot bounds gpu clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.requirements: requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one or pass PYTHON=/path/to/python." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned requirements into $(VENV) (about 6 GB on disk, most of it CUDA libraries of torch) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.built: $(VENV)/.requirements $(NATIVE)
	@echo "Building the native module ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

setup: $(VENV)/.built ## Make .venv, install the pinned requirements, build the native module

demo: setup ## Fine-tune the shipped CLIP without and with InfoCLIP's objective; table, pictures, report (DEMO="--seeds 0,1,2")
	@$(BIN)/infoclip demo --out runs/demo $(DEMO)

demo-maftplus: setup ## FC-CLIP, naive fine-tuning and MAFT+ on the same scenes, InfoCLIP beside them; PQ too (DEMO="--seeds 0,1,2")
	@$(BIN)/infoclip demo --system maftplus --out runs/demo-maftplus $(DEMO)

test: lint ## Lint, types and the whole test suite, two files at a time (PYTEST="-k cost_volume" for a part, "-n 0" for one)
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST)

fuzz: setup ## Thousands of damaged and lying files through every reader, 8 minutes at most (FUZZ="--seed 1")
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --inputs 5600 --seconds 480 $(FUZZ)

lint: setup ## ruff (rules and format) and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: setup ## Benchmarks of every op against its reference (BENCH="cost_volume")
	@$(BIN)/python -m bench $(or $(BENCH),all)

aot: setup ## Every GPU kernel compiled without a GPU: registers, shared memory, spills, matrix instructions (AOT="infonce --all")
	@$(BIN)/python -m bench aot $(AOT)

bounds: setup ## Arithmetic and memory of a training step of the aggregation, counted (BOUNDS="--classes 150")
	@$(BIN)/python -m bench bounds $(BOUNDS)

gpu: setup ## What is pending on a GPU: correctness of every op on it, then all benchmarks into bench/results/all.gpu.json
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: torch sees no CUDA device; make aot needs none.")'
	@$(BIN)/python -m pytest -m gpu
	@$(BIN)/python -m bench all --json bench/results/all.gpu.json

clean: ## Remove the build and what the tests leave; keeps .venv and runs
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks infoclip/_C*.so $(VENV)/.built
	@find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
