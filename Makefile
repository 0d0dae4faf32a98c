# Everything here works on a fresh clone: the first target that needs it makes .venv.

PYTHON ?= python3
BIN := .venv/bin
PYTEST_ARGS ?=

# Tests and the demo start several processes; one thread each keeps them from fighting for cores.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: setup demo test test-all quick coverage doctest examples lint format lock clean

setup: .venv/.installed

.venv/.installed: requirements-dev.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/meshwright demo

test: setup
	$(BIN)/python -m pytest --durations=10 -m "not slow" $(PYTEST_ARGS)

# The whole grids: every model with every plan, on virtual ranks and on real processes.
test-all: setup
	$(BIN)/python -m pytest --durations=10 $(PYTEST_ARGS)

# What needs neither long nor other processes: for the minute between two edits.
quick: setup
	$(BIN)/python -m pytest -m "not gpu and not slow and not dist" $(PYTEST_ARGS)

# Processes that tests start are not counted.
coverage: setup
	$(BIN)/coverage run -m pytest $(PYTEST_ARGS)
	$(BIN)/coverage report --skip-covered

doctest: setup
	$(BIN)/python -m pytest --doctest-modules meshwright || test $$? -eq 5  # 5: no examples

examples: setup
	set -e; for example in examples/*.py; do \
		test -e "$$example" || continue; echo "$$example"; $(BIN)/python "$$example"; done

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Writes down what is installed now, after versions were changed on purpose.
lock:
	$(BIN)/python .ci/lock.py

clean:
	rm -rf .venv build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
