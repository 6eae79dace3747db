# make test        lint, types and tests, in a virtual environment made on first use (.venv)
# make test-fast   the tests that are not marked slow: every rule, wherever it runs
# make demo        the demonstration, in the same environment
# make bench       the benchmarks, in the same environment
# Overridable: PYTHON (what makes the environment), VENV (its folder), TORCH (its torch: the name
# of a file in requirements/), TESTS, PYTEST_ARGS. The variables of the build are in CMakeLists.txt.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= cuda
TESTS ?= tests
# A worker a core, each with one thread (tests/conftest.py).
PYTEST_ARGS ?= -q -n logical --maxprocesses 8 --dist worksteal

BIN := $(VENV)/bin
CONSTRAINTS := requirements/$(TORCH).txt
TORCH_cuda := torch torchvision
TORCH_cpu := torch
EXTRAS_cuda := dev,viz,tensorboard,bench,hf,lightning,timm
EXTRAS_cpu := dev,viz,tensorboard

BUILD_INPUTS := setup.py CMakeLists.txt $(wildcard cmake/* csrc/* csrc/*/*)

.PHONY: test test-fast lint pytest demo bench build clean

test: lint pytest

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: build
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(TESTS)

test-fast: build
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow" $(TESTS)

demo: build
	$(BIN)/python -m bench.accuracy.demo

bench: build
	$(BIN)/python -m bench

build: $(VENV)/.built

# torch first: the build needs it, and is not isolated from it.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) requirements/dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) $(TORCH_$(TORCH)) setuptools wheel cmake ninja pybind11
	touch $@

$(VENV)/.built: $(VENV)/.installed $(BUILD_INPUTS)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-build-isolation -e ".[$(EXTRAS_$(TORCH))]"
	@$(BIN)/python -c 'import gradamp_fast._extension as e; print(e.reason() or e.built_with())'
	touch $@

clean:
	rm -rf build dist *.egg-info .venv .venv-cpu gradamp_fast/_C*.so compile_commands.json
