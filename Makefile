# Two commands: `make demo` runs the main job, `make test` every check. Each installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test notebooks lab docs clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.installed: settings.ini setup.py | $(BIN)/python
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.installed-dev: settings.ini setup.py | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed ## train a network on one task after another (permuted digits), watch it lose the ability to learn, write outputs/<run>/report.html
	$(BIN)/plasticity

test: $(VENV)/.installed-dev ## every check that CI runs
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/ci.sh

notebooks: $(VENV)/.installed-dev ## run every notebook in a real JupyterLab and a headless Chromium (about half an hour on 2 cores)
	PATH="$(CURDIR)/$(BIN):$$PATH" ALL_NOTEBOOKS=1 OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q tests/browser/test_pages.py -k notebook_runs

lab: $(VENV)/.installed-dev ## open the notebooks
	$(BIN)/jupyter lab nbs

docs: $(VENV)/.installed-dev ## build the site with Quarto
	@command -v quarto >/dev/null || { echo 'The site is built with Quarto: get it at https://quarto.org/docs/get-started/ and run `make docs` again.'; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_docs

clean: ## remove what can be made again
	rm -rf $(VENV) _proc _docs *.egg-info
