# Everything runs in .venv, which is made on first use. `make help` lists the targets.

PYTHON      ?= python3
VENV        ?= .venv
TORCH       ?= torch==2.13.0
# For machines without a GPU: TORCH_INDEX=URL of PyTorch's index of CPU builds saves gigabytes.
TORCH_INDEX ?=
PROMPT      ?= def fibonacci(n):
SERVE_FLAGS ?=
BENCH_FLAGS ?=
SEEDS       ?= 2000
FAULT_FLAGS ?=
REPETITIONS ?= 20
CHAOS_FLAGS ?=
ROLLING_FLAGS ?=
MINUTES     ?= 10
SOAK_FLAGS  ?=
RESULTS_FLAGS ?=
FUZZ        ?= tests/fuzz
PYTEST_FLAGS ?=
JOBS        ?= 2

BIN := $(VENV)/bin
NATIVE := setup.py $(wildcard baton/native/src/*)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv serve test faults chaos rolling soak fuzz lint format proto docs docs-reference bench bench-gpu results demo-model clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) (the largest part; minutes on a slow line)"
	$(PIP) '$(TORCH)' $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.serve: $(VENV)/.torch pyproject.toml constraints.txt $(NATIVE)
	@echo "installing baton and NIXL"
	$(PIP) -e '.[nixl]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt $(NATIVE)
	@echo "installing baton with the development tools"
	$(PIP) -e '.[nixl,cuda,redis,ray,otel,docs,dev]'
	@touch $@ $(VENV)/.serve

venv: $(VENV)/.dev ## make .venv with everything that development needs

serve: $(VENV)/.serve ## a whole cluster on this machine, one answer, then serve until Ctrl-C
	@exec $(BIN)/baton serve --try '$(PROMPT)' $(SERVE_FLAGS)

lint: $(VENV)/.dev ## ruff, mypy, import layers, generated stubs and references, links in documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/gen_proto.py --check
	$(BIN)/python -m tools.docs --check

# One thread per process: the tests start many processes on few cores.
test fuzz: export OMP_NUM_THREADS ?= 1
test fuzz: export TOKENIZERS_PARALLELISM := false
test fuzz: export HF_HUB_OFFLINE := 1
# JOBS files at once: much of a cluster's test is waiting for processes. The long ones begin.
test: lint ## everything that CI runs
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  tests/cluster tests/unit tests/faults tests/fuzz tests/gpu $(PYTEST_FLAGS)
	$(BIN)/python -m sim.faults --seeds $(SEEDS)

faults: $(VENV)/.dev ## SEEDS runs of a modelled cluster under faults, each exactly repeatable
	$(BIN)/python -m sim.faults --seeds $(SEEDS) $(FAULT_FLAGS)

chaos: $(VENV)/.dev ## real processes killed and stopped in every phase of a request; needs redis-server
	$(BIN)/python -m bench.chaos --repetitions $(REPETITIONS) $(CHAOS_FLAGS)

rolling: $(VENV)/.dev ## every process restarted by SIGTERM under load; needs redis-server
	$(BIN)/python -m bench.rolling $(ROLLING_FLAGS)

# Without pytest's own logging: it keeps every line of every case.
soak: $(VENV)/.dev ## half an hour of mixed load and random kills on real processes; needs redis-server
	$(BIN)/python -m bench.soak $(SOAK_FLAGS)

fuzz: $(VENV)/.dev ## try what nobody should send, MINUTES for each file of FUZZ
	FUZZ_MINUTES=$(MINUTES) $(BIN)/python -m pytest -p no:logging --show-capture=no $(FUZZ) $(PYTEST_FLAGS)

format: $(VENV)/.dev ## rewrite the sources with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.dev ## generate the stubs in baton/v1 from proto/
	$(BIN)/python tools/gen_proto.py

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.dev ## the documentation's site in site/; a broken link is an error
	$(BIN)/python -m mkdocs build --quiet

docs-reference: $(VENV)/.dev ## the references in docs/ that are made from the sources
	$(BIN)/python -m tools.docs

bench: $(VENV)/.dev ## baton next to vLLM and transformers: same model, cores and load, in turns
	$(BIN)/python -m bench $(BENCH_FLAGS)

bench-gpu: ## everything about a GPU in ten minutes, by the system's Python: nothing is installed
	PYTHONPATH=. $(PYTHON) -m baton.bench.gpu $(BENCH_FLAGS)

results: $(VENV)/.dev ## docs/results/mooncake.md from simulations of TRACE, Mooncake's conversation trace
	@$(if $(TRACE),,$(error TRACE=FILE says where Mooncake's conversation trace is))
	$(BIN)/python -m sim.results --trace '$(TRACE)' $(RESULTS_FLAGS)

demo-model: $(VENV)/.dev ## train the built-in model again (an hour or two on two cores)
	$(BIN)/python -m tools.train_demo

clean: ## remove what was built, and .venv
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis site
