# The README's commands by name, each in an environment of its own.
VENV := .venv
TEST_VENV := .venv-test
PYTHON ?= python3
BENCHMARKS := $(shell grep -l '^def test_' benchmarks/*.py)

.PHONY: train test bench lint clean

$(VENV)/bin/lowp:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -e .

$(TEST_VENV)/bin/pytest:
	$(PYTHON) -m venv $(TEST_VENV)
	$(TEST_VENV)/bin/pip install -e ".[test]"

$(TEST_VENV)/bin/ruff: $(TEST_VENV)/bin/pytest
	$(TEST_VENV)/bin/pip install -e ".[test,dev]"

train: $(VENV)/bin/lowp
	$(VENV)/bin/lowp train

test: $(TEST_VENV)/bin/pytest
	$(TEST_VENV)/bin/pytest

bench: $(TEST_VENV)/bin/pytest
	$(TEST_VENV)/bin/pytest $(BENCHMARKS) --benchmark-enable
	$(TEST_VENV)/bin/python -m benchmarks.growth

lint: $(TEST_VENV)/bin/ruff
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/mypy
	git ls-files '*.cpp' '*.cu' '*.h' | xargs $(TEST_VENV)/bin/clang-format --dry-run -Werror

clean:
	rm -rf build lowp.egg-info lowp/*.so lowp/_build.json
