# make test        lint, types and tests, in a virtual environment made on first use (.venv)
# make test-fast   the tests that are not marked slow: every rule, wherever it runs
# make demo        the demonstration, in the same environment; builds what this machine can use alone
#                  (DEMO_ARGS=--full tells of every layer)
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

INSTALL = $(BIN)/python -m pip install -c $(CONSTRAINTS) --no-build-isolation
SUMMARY = $(BIN)/python -c 'import gradamp_fast._extension as e; print(e.reason() or e.built_with())'

BUILD_INPUTS := setup.py CMakeLists.txt gradamp_fast/_version.py $(wildcard cmake/* csrc/* csrc/*/*)

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

# A build for all GPU generations serves as well, where there is one.
demo: $(if $(wildcard $(VENV)/.built),$(VENV)/.built,$(VENV)/.built-for-demo)
	$(BIN)/python -m bench.accuracy.demo $(DEMO_ARGS)

bench: build
	$(BIN)/python -m bench

build: $(VENV)/.built

# torch first: the build needs it, and is not isolated from it.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) requirements/dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) $(TORCH_$(TORCH)) setuptools wheel cmake ninja pybind11
	touch $@

$(VENV)/.built: $(VENV)/.installed $(BUILD_INPUTS)
	$(INSTALL) -e ".[$(EXTRAS_$(TORCH))]"
	@$(SUMMARY)
	touch $@

$(VENV)/.built-for-demo: $(VENV)/.installed $(BUILD_INPUTS)
	env $$($(BIN)/python cmake/this_machine.py) $(INSTALL) -q -e ".[bench]"
	touch $@

clean:
	rm -rf build dist *.egg-info .venv .venv-cpu gradamp_fast/_C*.so compile_commands.json
