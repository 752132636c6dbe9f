# make demo    train on generated figures and write a report: needs Python 3.11+, no compiler, no GPU, no data
# make check   lint, format, types, floors
# make test    the tests that take seconds;  make test-all  all of them, or those of SELECTED="-m 'not long'"
# Everything is installed into .venv; another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo test test-all check

demo: .venv/.installed
	$(BIN)/oml-ray train configs/train/figures.yaml
	@echo "The report: runs/figures/report.html"

test: .venv/.installed-dev
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/.installed-dev
	$(BIN)/python -m pytest $(SELECTED)

check: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# A stamp, not .venv itself: creation that was interrupted half-way is done again.
.venv/.created:
	@command -v $(PYTHON) >/dev/null || { echo "oml_ray needs Python 3.11 or newer, and '$(PYTHON)' is not on the PATH: install it, or name yours with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "oml_ray needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1): name a newer one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot create virtual environments: install its venv package (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: pyproject.toml constraints.txt | .venv/.created
	$(INSTALL) --editable .
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/.created
	@command -v $${CXX:-g++} >/dev/null || { echo "hnswlib is built from source and needs a C++ compiler, and '$${CXX:-g++}' is not on the PATH: install one (Debian, Ubuntu: apt-get install g++), or name yours with CXX=...; 'make demo' needs none" >&2; exit 1; }
	@$(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "hnswlib is built from source and needs the headers of Python: install them (Debian, Ubuntu: apt-get install python3-dev); 'make demo' needs none" >&2; exit 1; }
	$(INSTALL) --editable '.[dev,hnsw]'
	@touch $@ .venv/.installed
