# The README's commands by name, each in an environment of its own.
VENV := .venv
TEST_VENV := .venv-test
PYTHON ?= python3
NATIVE_TESTS := $(addprefix tests/test_,$(addsuffix .py,quantize scaled_mm linear_op direct_calls activation \
  bias_grad optim_ops matrix_optim_ops optim_family layer lstm))
BENCHMARKS := $(shell grep -l '^def test_' benchmarks/*.py)

.PHONY: train test bench sanitize lint clean

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

sanitize: $(TEST_VENV)/bin/pytest
	LOWP_REQUIRE_NATIVE=1 LOWP_SANITIZE=address,undefined,float-cast-overflow \
	  $(TEST_VENV)/bin/pip install --no-deps -e .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(TEST_VENV)/bin/pytest -s $(NATIVE_TESTS); status=$$?; \
	  $(TEST_VENV)/bin/pip install --no-deps -e .; exit $$status

lint: $(TEST_VENV)/bin/ruff
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/mypy
	git ls-files '*.cpp' '*.cu' '*.h' | xargs $(TEST_VENV)/bin/clang-format --dry-run -Werror

clean:
	rm -rf build lowp.egg-info lowp/*.so lowp/_build.json
