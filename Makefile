# Every target sets up .venv first (scripts/setup.sh), which takes no time when nothing changed.
#
#   make demo                       distil a real language model on this machine
#   make check                      format, lint, types, doors, the rules of the house
#   make test                       all tests but the slow ones and those that need a GPU
#   make test-slow                  kills, compiled runs, several processes: some minutes
#   make bench                      all benchmarks; bench-loss, bench-store: the losses or the store of signals only
#   make PYTHON=python3.12 test     choose the interpreter of a new .venv

PYTHON ?=
export PYTHON
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-slow test-gpu check bench bench-loss bench-store clean setup .venv

demo: setup
	$(BIN)/potstill run recipes/quickstart.yaml

test: setup
	$(PYTEST) -m "not slow and not gpu"

test-slow: setup
	$(PYTEST) -m "slow and not gpu"

test-gpu: setup
	$(PYTEST) -m gpu

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) tests/test_house.py tests/test_docs.py

bench: bench-loss bench-store
	$(BIN)/python bench/step.py --json runs/bench/step.json
	$(BIN)/python bench/quickstart.py --json runs/bench/quickstart.json

bench-loss: setup
	mkdir -p runs/bench
	$(BIN)/python bench/loss.py --json runs/bench/loss.json

# The runs of gain.py stay in runs/bench/gain: called again, it does only what is missing there.
bench-store: setup
	mkdir -p runs/bench
	$(BIN)/python bench/store.py --json runs/bench/store.json
	$(BIN)/python bench/step.py --offline --json runs/bench/offline.json
	$(BIN)/python bench/gain.py --json runs/bench/gain.json

setup .venv:
	@scripts/setup.sh

# Neither runs/ nor the samples in the user's cache folder: they are results and downloads.
clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
