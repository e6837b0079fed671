# demo and test set up everything they need in .venv; a fresh machine needs Python (>= 3.11) only
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := PYTHONPATH= $(BIN)/python
# two workers and two threads each would fight for two cores
export OMP_NUM_THREADS ?= 1
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && n=4; echo $$n)

.PHONY: help demo test test-all check format evidence docs bench gpu-check clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 12

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,report]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,report,tasks,hf,dev]'
	@touch $@

demo: $(VENV)/.demo ## install, compare six mixers on real text, write report.html (about ten minutes)
	OMP_NUM_THREADS=2 $(BIN)/tevo compare softmax linear_attention delta_net hyena lru rwkv --task text --seeds 5,1 --budget 6m --report report.html

test: $(VENV)/.dev ## install and run the default tests
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m 'not slow and not gpu'

test-all: $(VENV)/.dev ## the slow tests too
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m 'not gpu'

check: $(VENV)/.dev ## format, lint, spelling, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell src tests benchmarks docs/*.md *.md
	$(BIN)/mypy

format: $(VENV)/.dev ## put the code into the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

evidence: $(VENV)/.dev ## run every shared check of every system and write evidence/
	$(RUN) -m tevo.testing.evidence

docs: $(VENV)/.dev ## generate the pages of docs/ and build the site docs/_build/html
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(RUN) -m docs.generate
	$(RUN) -m sphinx -q -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.dev ## time the cores against the plain forms and the peers
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(RUN) -m benchmarks.run

gpu-check: ## the GPU tests, with what the machine has
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
