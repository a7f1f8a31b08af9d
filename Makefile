# Every command that people and CI use. `make run` and `make test` install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := src tests studies examples benchmarks

BENCH := .venv-bench
RESULTS := benchmarks/results/$(shell date +%F)
DATA ?=
NETWORK ?=
PAIRS ?= 5

.PHONY: install run test check slow network demo-network quantized bench bench-network clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "polyrank needs Python 3.11 or newer; set PYTHON=..."; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing; on Debian: apt install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

run: install
	$(BIN)/polyrank run

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: install
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

slow: install
	$(BIN)/python -m pytest -m slow

# Real sites: the extra `flare` comes into the same place.
$(VENV)/flare: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,flare]'
	@touch $@

# A server and three sites as processes, killed, cut off and started again. NETWORK may pick some of the tests.
# First the tests that `make test` skips where the extra is not there.
network: $(VENV)/flare
	$(BIN)/python -m pytest $$(grep -l 'importorskip("nvflare")' tests/unit/*.py)
	$(BIN)/python -m pytest -m network $(NETWORK) tests/network

# torchao stays out of the tests' environment until it is asked for: transformers imports it wherever it finds it.
quantized: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torchao
	$(BIN)/python -m pytest $$(grep -l 'importorskip("torchao")' tests/unit/*.py)

bench-network: $(VENV)/flare
	$(BIN)/python -m benchmarks.network --out $(RESULTS)-network.json

demo-network: $(VENV)/flare
	$(BIN)/python examples/network.py

# Flower wants an older typer, packaging and protobuf than the tested versions name, so it lives in a place of its own.
$(BENCH)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(BENCH)
	grep -v -E '^(typer|packaging|protobuf)==' constraints.txt > $(BENCH)/constraints.txt
	$(BENCH)/bin/python -m pip install --quiet --constraint $(BENCH)/constraints.txt torch==2.13.0
	$(BENCH)/bin/python -m pip install --quiet --constraint $(BENCH)/constraints.txt --editable '.[demo,bench]'
	@touch $@

# Takes hours. DATA names the folder that holds ag_news/; without it that part is skipped.
bench: $(BENCH)/installed
	$(BENCH)/bin/python -m benchmarks.engine --pairs $(PAIRS) $(if $(DATA),--data $(DATA)) --out $(RESULTS)-engine.json
	$(BENCH)/bin/python -m benchmarks.aggregation --out $(RESULTS)-aggregation.json
	$(BENCH)/bin/python -m benchmarks.costs --pairs $(PAIRS) --out $(RESULTS)-costs.json
	$(BENCH)/bin/python -m benchmarks.peers --pairs $(PAIRS) $(if $(DATA),--data $(DATA)) --out $(RESULTS)-peers.json

clean:
	rm -rf $(VENV) $(BENCH)
