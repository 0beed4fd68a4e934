# Each target does its own set-up: a virtual environment in .venv, pinned by constraints.txt. Another Python than 3.11
# by make PYTHON=python3.12; remove .venv first.
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.ready

# The tests start hundreds of processes, which shall not compile our modules each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all lint protos contract client bench up clean

demo: $(STAMP)  ## the main job from nothing to runs/demo/report.json
	$(BIN)/ethogram demo

up: $(STAMP)  ## the whole platform on loopback, until Ctrl-C
	$(BIN)/ethogram up

# Three processes for two cores, since many tests wait for others. Files in order: the last ones are short.
PYTEST := $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

test: $(STAMP)  ## the tests of every change
	$(PYTEST) -m "not slow"

test-all: $(STAMP)  ## the slow ones too
	$(PYTEST)

lint: $(STAMP)  ## ruff, mypy, import arrows, protobuf style and compatibility, freshness of what is generated
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf breaking --against contract.binpb
	$(BIN)/python -m scripts.protos --check
	$(BIN)/python -m scripts.sync_client --check

protos: $(STAMP)  ## regenerate what follows from specs, kinds and protos: spec messages, ethogram/v1, a table in the docs
	$(BIN)/python -m scripts.protos

contract: $(STAMP)  ## at a release: make today's protos the contract that `make lint` compares later ones with
	cd protos && ../$(BIN)/buf build --exclude-source-info -o contract.binpb

client: $(STAMP)  ## regenerate ethogram/client.py from ethogram/aio.py
	$(BIN)/python -m scripts.sync_client

bench: $(STAMP)  ## make bench BENCH=name [ARGS="..."]; the last line is one JSON object
	@test -n "$(BENCH)" || { echo "usage: make bench BENCH=name; there are: $$(ls benchmarks | sed -n 's/^\([a-z_]*\)\.py$$/\1/p' | grep -v '^_' | tr '\n' ' ')"; exit 2; }
	$(BIN)/python -m benchmarks.$(BENCH) $(ARGS)

clean:  ## remove what runs left; keeps the virtual environment
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: install Python 3.11, or name another one with make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[server,dev]'
	touch $(STAMP)
