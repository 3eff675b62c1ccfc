# Everything a contributor runs. Needs make, Python 3.11 or newer and a package index; no GPU, no model hub.
# The environment is made on first use: `make test` and `make demo` work in a fresh clone.

PYTHON ?= python3
VENV ?= .venv
SOURCES := trl_sharelora tests examples benchmarks
CONSTRAINTS := constraints/tested.txt
TORCH := $(shell sed -n 's/^torch==//p' $(CONSTRAINTS))
ARGS ?=

ifeq ($(VENV),0)
# Use the environment that is active, as it is: `make install VENV=0` installs into it, the other targets change nothing there.
PY := $(shell command -v $(PYTHON))
READY :=
STAMP := install-here
else
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
READY := $(STAMP)
endif

# Never leave a test or a demo waiting for a hub, and send no usage reports.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# One thread per test process: with two, small models on two cores run up to a hundred times slower.
TESTING := $(OFFLINE) OMP_NUM_THREADS=1 CI=1

.DEFAULT_GOAL := help
.PHONY: help install install-here demo test test-slow check format bench clean

help: ## this list
	@echo "make TARGET [VENV=0] [PYTHON=python3.12] [ARGS='more arguments']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "VENV=0 uses the environment that is active. A torch that is installed already is used, never replaced."

install: $(STAMP) ## make .venv and install the package with the tested versions (done by the others when needed)

demo: $(READY) ## personalised reward model against pooled LoRA on users with different tastes; table and picture
	$(OFFLINE) CI=1 $(PY) -m trl_sharelora.cli demo $(ARGS)

test: $(READY) ## the test suite
	$(TESTING) $(PY) -m pytest -n 2 -q $(ARGS)

test-slow: $(READY) ## the tests that take minutes
	$(TESTING) $(PY) -m pytest -n 2 -q -m slow $(ARGS)

check: $(READY) ## style, format and types
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m mypy

format: $(READY) ## put style and format right
	$(PY) -m ruff check --fix $(SOURCES)
	$(PY) -m ruff format $(SOURCES)

bench: $(READY) ## the speed table: asked, measured with quartiles, pass or miss; about six minutes
	$(TESTING) $(PY) benchmarks/step_time.py $(ARGS)

clean: ## remove what tools left behind (not .venv)
	rm -rf .pytest_cache .ruff_cache .mypy_cache dist
	find trl_sharelora tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# A torch that this Python already has (a cluster image, conda) is used and never replaced: the new environment sees it, and the
# constraint then names the version that is there.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed; {sys.executable} is {sys.version}. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	$(call pip_install,$(VENV)/constraints.txt,torch.__file__.startswith(sys.prefix))
	touch $@

install-here:
	$(call pip_install,$(or $(TMPDIR),/tmp)/trl-sharelora-constraints.txt,False)

# $(1): where the constraints in force are written; $(2): Python, is the torch that can be imported one to replace?
define pip_install
	kept=$$($(PY) -c 'import sys, torch; print("" if $(2) else torch.__version__)' 2>/dev/null); \
	sed "s/^torch==.*/torch==$${kept:-$(TORCH)}/" $(CONSTRAINTS) >$(1)
	$(PY) -m pip install --quiet -c $(1) -e ".[test,report]"
endef
