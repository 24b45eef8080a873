# Everything runs in .venv, which each target makes or renews when it needs to.
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
PIP = $(BIN)/pip install -qq --disable-pip-version-check --constraint constraints.txt --editable
COSTS = docs/_data/what_it_costs.json
export MATPLOTLIBRC = $(CURDIR)/gallery

.DEFAULT_GOAL := help
.PHONY: help demo test lint types doctest tests gallery notebooks docs browser serve lab slides archive sheet stills bench evidence fuzz torch24 gpu clean

help: ## Show this list
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/ready: pyproject.toml constraints.txt
	@echo "Installing into .venv (some minutes the first time; torch is about 200 MB) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "singd needs Python 3.10 or newer; choose one with make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(PIP) '.[dev]'
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
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -rs

fuzz: .venv/ready ## Run the nets on 10,000 random examples, and write what they tried into the docs
	@OMP_NUM_THREADS=1 $(BIN)/python tests/nets/figures.py 10000 $(SEED)

torch24: ## Run the tests of training with the oldest torch that is allowed (3 GB; some are known to fail)
	@test -x build/torch24/bin/python || $(PYTHON) -m venv build/torch24
	@build/torch24/bin/pip install -qq torch==2.4.1 numpy==2.2.6 pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.17
	@OMP_NUM_THREADS=1 PYTHONPATH=src build/torch24/bin/python -m pytest tests/test_optimizer.py tests/defects \
		tests/layers tests/kernels tests/structures tests/rules tests/nets/test_random_layers.py tests/nets/test_kills.py

gpu: .venv/ready ## Run what must hold on a GPU, where there is one
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
		then $(BIN)/pytest -m gpu tests/gpu; else echo "There is no GPU here that torch can use; nothing was run."; fi

gallery: .venv/ready ## Run every notebook of the gallery and compare its outputs
	@$(BIN)/python tools/notebooks.py check
	@OMP_NUM_THREADS=1 $(BIN)/pytest --nbval --nbval-sanitize-with tests/nbval_sanitize.cfg notebooks \
		-n auto --dist loadfile

notebooks: .venv/ready ## Execute the notebooks whose page changed
	@$(BIN)/python tools/notebooks.py build

.venv/docs: .venv/ready
	@echo "Installing what the site is built with ..."
	@$(PIP) '.[dev,docs]'
	@touch $@

.venv/lab: .venv/ready
	@echo "Installing JupyterLab ..."
	@$(PIP) '.[dev,lab]'
	@touch $@

docs: .venv/docs ## Build the site; unchanged pages are not run again
	@command -v node >/dev/null || { echo "The site's mathematics is set by node; install Node.js first."; exit 1; }
	@PYTHONWARNINGS=ignore $(BIN)/sphinx-build -n -W --keep-going docs docs/_build/site
	@echo "Open docs/_build/site/index.html, or run make serve to search it as well."

browser: docs ## Read the built site in a real browser (needs Chromium)
	@command -v chromium >/dev/null || { echo "The browser tests need Chromium; install it first."; exit 1; }
	@SINGD_BROWSER=1 $(BIN)/pytest tests/test_site.py tests/test_slides.py tests/test_interactive.py -n auto --dist worksteal

serve: docs ## Serve the site on this machine
	@echo "http://127.0.0.1:$(PORT)"
	@$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory docs/_build/site

lab: .venv/lab ## Open JupyterLab on the course
	@$(BIN)/jupyter lab $(firstword $(filter-out %_solution.ipynb,$(wildcard notebooks/plot_0*.ipynb)) notebooks)

slides: .venv/docs ## Make slides of every notebook; they open without a network
	@$(BIN)/python tools/slides.py build/slides

archive: ## Pack the gallery, its notebooks and the package into build/singd-gallery.zip
	@mkdir -p build
	@$(PYTHON) tools/archive.py build/singd-gallery.zip

sheet: docs ## Print the cheat sheet to docs/_static/cheat_sheet.pdf (needs Chromium)
	@$(BIN)/python tools/cheat_sheet.py

stills: .venv/docs ## Draw the still pictures of the figures that can be moved (needs node and Chromium)
	@$(BIN)/python tools/stills.py

build/peers/ready: tests/benchmarks/peers.txt .venv/ready
	@echo "Installing the published package into build/peers, beside ours ..."
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps --upgrade --target build/peers \
		--requirement tests/benchmarks/peers.txt
	@touch $@

bench: build/peers/ready ## Measure what everything costs, next to other optimizers (15 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/run.py --peers build/peers $(COSTS)
	@$(BIN)/python tools/notebooks.py --force build plot_45_what_it_costs
	@$(BIN)/python tools/run_page.py gallery/4_structures/plot_45_what_it_costs.py build/bench

evidence: build/peers/ready ## Compare with tuned AdamW, Muon, SOAP, ... on five tasks (hours; goes on where it stopped)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/evidence/evidence.py $(WITH)

clean: ## Remove what the targets made
	rm -rf .venv build dist docs/_build docs/auto_gallery docs/gen_modules src/*.egg-info .*_cache
