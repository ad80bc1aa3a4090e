# One list of commands. Needs Python 3.11 or newer, pip and make: the virtual environment is made on first use.
#
#   VENV=path       another environment than .venv
#   PYTHON=path     the interpreter it is made with
#   ARGS="..."      handed on: make test ARGS="-k fencing", make bench ARGS="--check"

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Pytest's worker processes, for two cores: tests of faults wait for most of their time.
WORKERS ?= 4
EXTRAS ?= torch,checksum,cli,read,server,postgres,otel,dev
ARGS ?=

BIN := $(VENV)/bin
RUN := $(BIN)/python
INSTALLED := $(VENV)/.shardbook-installed
SOURCES := client server migrations tests benchmarks examples proto docs

.DEFAULT_GOAL := help
.PHONY: help install demo session test soak check lint types imports proto proto-check docs docs-check bench fix clean

help: ## list these commands
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Also right for an environment that exists already: it is kept, and what it lacks is installed.
$(INSTALLED): pyproject.toml constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Shardbook needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints-dev.txt --editable '.[$(EXTRAS)]'
	@touch $@

install: $(INSTALLED) ## make the environment and install everything into it

demo: $(INSTALLED) ## the whole story on this machine: 4 ranks train, save, lose the server, load elsewhere
	$(RUN) examples/demo.py $(ARGS)

session: $(INSTALLED) ## a session over 100,000 checkpoints: find, describe, compare, follow; ARGS=--postgres
	$(RUN) -m examples.catalogue $(ARGS)

test: $(INSTALLED) ## the tests; installs pgbouncer where it is missing and apt-get may
	@tests/tools.sh
	$(RUN) -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder -m "not soak" $(ARGS)

soak: $(INSTALLED) ## the slow tests that `make test` leaves out, and every property with many more examples
	@tests/tools.sh
	$(RUN) -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder -m soak $(ARGS)
	$(RUN) -m pytest --numprocesses=$(WORKERS) --hypothesis-profile=soak --timeout=3600 tests/unit $(ARGS)

check: lint types imports proto-check docs-check ## what CI runs beside the tests: lint, types, import rules, drift

lint: $(INSTALLED) ## style and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(INSTALLED) ## mypy, strict
	$(RUN) -m mypy

imports: $(INSTALLED) ## who may import whom
	$(BIN)/lint-imports --no-logo --cache-dir .import_linter_cache

proto: $(INSTALLED) ## generate client/shardbook/v1 from proto/
	$(RUN) proto/generate.py

proto-check: $(INSTALLED) ## lint the proto files; fail where the committed stubs differ from them
	$(BIN)/buf lint proto
	$(RUN) proto/generate.py --check

docs: $(INSTALLED) ## generate the pages of docs/ that are made from code
	$(RUN) docs/generate.py

docs-check: $(INSTALLED) ## fail where they differ from it
	$(RUN) docs/generate.py --check

bench: $(INSTALLED) ## every benchmark, the short way
	$(RUN) -m benchmarks all --quick $(ARGS)

fix: $(INSTALLED) ## repair what lint can repair by itself
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean: ## remove the environment and every cache
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
