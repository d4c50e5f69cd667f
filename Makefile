# `make help` lists what there is. All the work is done by scripts/: this file only names it.
#
# PYTHON=python3.12   the Python that makes .venv (default: the first of python3, python3.13, ... that is 3.11 or newer)
# OFFLINE=folder      set up from a folder of wheels, without the network (`make wheels DIR=folder` fills one)
# TORCH_INDEX=url     where CPU builds of torch are, if pip's own sources have none (default: the PyTorch project's)
# STEPENGINE_TORCH=cpu|cuda   the build of torch, if what is found on this machine should not decide
# FAST=1              `make ladder` in its short form
# ARGS="..."          further arguments for the command behind `learn`, `site`, `lessons`, `test-browser`, `gpu-test`, `gpu` and `ladder`

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python,\
	$(shell $(name) -c '$(NEW_ENOUGH)' 2>/dev/null && echo $(name))))
endif
MODEL := smollm2-135m
SETUP = $(PYTHON) scripts/setup.py $(if $(OFFLINE),--offline "$(OFFLINE)")

.DEFAULT_GOAL := help
.PHONY: help setup learn site lessons test test-browser gpu-test gpu ladder wheels clean python

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

learn: python ## set up, then open JupyterLab on your own copies of the notebooks, in learn/
	@$(SETUP) --model $(MODEL)
	@.venv/bin/python scripts/learn.py $(ARGS)

site: python ## set up, then build the site of the executed series, in site/ (ARGS="--no-solutions", "--only 02a_paged")
	@$(SETUP) --model $(MODEL) --extra site
	@.venv/bin/python scripts/site.py $(ARGS)

lessons: python ## set up, then record the runs that docs/instructors.md projects: players in lessons/
	@$(SETUP) --model $(MODEL)
	@.venv/bin/python scripts/lesson_players.py $(ARGS)

test: python ## set up, then run every check
	@$(SETUP) --model $(MODEL) --extra site --extra browser
	@.venv/bin/python scripts/check.py

test-browser: python ## set up, then drive JupyterLab, the site and the player in a headless Chromium
	@$(SETUP) --model $(MODEL) --extra site --extra browser
	@.venv/bin/python scripts/chromium.py
	@STEPENGINE_BROWSER=required .venv/bin/python -m pytest -rs -n 2 --dist loadgroup tests/browser $(ARGS)

gpu-test: python ## set up, then run the kernels' tests on this machine's GPU
	@$(SETUP)
	@.venv/bin/python -m pytest -rs -m gpu tests/kernels $(ARGS)

gpu: python ## set up, then measure every stage on this machine's GPU (at most nine minutes), into bench/records/
	@$(SETUP)
	@.venv/bin/python -m stepengine.bench.gpu --out bench/records $(ARGS)

ladder: python ## set up, then run every stage on the same requests (FAST=1: in under a minute)
	@$(SETUP) --model $(MODEL)
	@.venv/bin/stepengine ladder $(if $(FAST),--fast) $(ARGS)

setup: python ## prepare .venv only (OFFLINE=folder: from a folder of wheels)
	@$(SETUP)

wheels: python ## fill DIR with the wheels that OFFLINE=DIR needs
	@$(SETUP) --wheels "$(or $(DIR),wheels)"

clean: ## remove .venv and caches; learn/, runs/ and downloaded models stay
	rm -rf .venv build stepengine.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find stepengine tests scripts notebooks -name __pycache__ -type d -prune -exec rm -rf {} +

python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer is on PATH; install one, or name it: make setup PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "$(PYTHON) is older than 3.11, which stepengine needs; name another: make setup PYTHON=python3.12" >&2; exit 1; }
