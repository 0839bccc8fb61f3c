# A fresh clone needs `make quickstart` and nothing else. Targets that need the environment make it first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DOCS_VENV ?= build/docs-venv
SITE ?= build/site
STAMP := $(VENV)/.installed
# How many processes run the tests. Each holds the models, about 3 GB.
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-full mutants lint format docs bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## make the environment in .venv

quickstart: $(STAMP)  ## ingest the sample documents and ask questions, with and without blending
	$(BIN)/python examples/quickstart.py

test: $(STAMP)  ## run the tests; ARGS="-k word" for some of them, JOBS=0 in one process
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not full and not browser" $(ARGS)

test-full:  ## run everything that needs no GPU, with real vLLM and LMCache servers; takes hours
	PYTHON="$(PYTHON)" .ci/full

mutants: $(STAMP)  ## take each fix out and see its test fail; ARGS="--needs none", ARGS="--only A1"
	$(BIN)/python tests/mutants/run.py $(ARGS)

lint: $(STAMP)  ## check style, types, and how modules import each other
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lmcache_rag integrations
	$(BIN)/python .ci/modules.py --check
	$(BIN)/python .ci/words.py

format: $(STAMP)  ## format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs:  ## make the documentation as a site, build/site/index.html, in an environment of its own
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --disable-pip-version-check --quiet uv
	$(DOCS_VENV)/bin/python -m uv pip install --quiet --link-mode copy --python $(DOCS_VENV)/bin/python --group docs
	$(DOCS_VENV)/bin/mkdocs build --strict --site-dir "$(abspath $(SITE))"

bench: $(STAMP)  ## measure the time to the first token
	$(BIN)/python benchmarks/ttft.py

clean:  ## remove the environment and everything else that was made here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov

# Made last, so that an installation that was cut off is taken up again.
$(STAMP): pyproject.toml .ci/install-torch
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, and $(PYTHON) is {v[0]}.{v[1]}. Name another one: make PYTHON=python3.12 $(or $(MAKECMDGOALS),install)")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV); the first time takes some minutes."
	sh .ci/install-torch $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet uv && $(BIN)/python -m uv pip install --link-mode copy --python $(BIN)/python --editable '.[dev]' \
		|| $(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@
