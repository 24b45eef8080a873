# Everything runs in .venv, which each target makes or renews when it needs to.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint types doctest tests gallery clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/ready: pyproject.toml constraints.txt
	@echo "Installing into .venv (some minutes the first time; torch is about 200 MB) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "singd needs Python 3.10 or newer; choose one with make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/ready ## Train a small CNN on real MNIST images with SINGD, AdamW and SGD
	@$(BIN)/python tools/run_page.py gallery/1_start/plot_10_first_steps.py build/demo

test: lint types doctest tests gallery ## Run all that proves the project
	@echo "All checks passed."

lint: .venv/ready ## Check style
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: .venv/ready ## Check types
	@$(BIN)/mypy

doctest: .venv/ready ## Run the examples in docstrings
	@$(BIN)/pytest --doctest-modules src

tests: .venv/ready ## Run the tests, on all cores
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

gallery: .venv/ready ## Run every page of the gallery as a script
	@for page in gallery/*/plot_*.py; do echo "== $$page"; $(BIN)/python tools/run_page.py $$page || exit 1; done

clean: ## Remove what the targets made
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
