# `make demo` and `make test` need Python >= 3.10 and a C++20 compiler; they make .venv and reuse it.
PYTHON ?= python3
# The CPU build of torch, where the package index has one; any torch >= 2.9 will do.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cmake -name '*.h' -o -name '*.c*') CMakeLists.txt setup.py pyproject.toml \
  scripts/toolchain.py scripts/compiling.py

.PHONY: demo test test-all test-cpp test-slow test-triton test-emulated emulated-extension fuzz gpu-check \
  lint format bench wheels wheel-check clean

# Modules are compiled to byte code by whatever imports them; pip would compile all of them first.
export PIP_NO_COMPILE = 1

demo: $(VENV)/runtime
	$(BIN)/guard-ops demo

# Two processes of as many threads as there are cores: none may spin while it waits for another.
test test-all test-slow test-triton test-emulated: export OMP_WAIT_POLICY = passive

# The compilers do not wait for pip and mypy, which have work for one core.
test:
	$(MAKE) --jobs 3 lint test-cpp emulated-extension
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(MAKE) test-triton test-emulated

# Before a release, and after a change to kernels: what takes minutes more, such as machine code for
# every architecture.
test-all: test test-slow

test-slow: $(VENV)/development emulated-extension
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow_suite
	GUARD_OPS_EMULATED=1 $(BIN)/python -m pytest -n 2 -q -m slow_suite -k cuda $(EMULATED_TESTS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q tests/test_goldens.py -k "triton and dance and not 0.001"

# The Triton kernels on the CPU, by Triton's interpreter: their own tests, and some of the others'. To
# a kernel one kind of SDE is like another, with other coefficients.
test-triton: $(VENV)/development
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q tests/device tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q tests/test_goldens.py tests/test_sde_step.py \
	  tests/test_torch_operators.py tests/test_life_of_a_call.py \
	  -k "triton and not dance and not cps and not K3 and not K2 and not 0.001"

# The CUDA kernels on an emulated device, through their backend and its bindings: their own tests, and
# the others' of the ops, but those in float64, which they have not.
EMULATED_TESTS := tests/device/test_cuda_paths.py tests/device/test_device_loss.py \
  tests/test_nonfinite.py::test_many_bad_elements_and_chunks tests/test_statistics.py \
  $(patsubst %,tests/test_%.py,autograd determinism goldens layouts numerics peers sde_step torch_operators)
test-emulated: $(VENV)/development emulated-extension
	GUARD_OPS_EMULATED=1 $(BIN)/python -m pytest -n 2 -q -k cuda $(EMULATED_TESTS)

# The fuzzer (tests/fuzz) for as long as one likes, where `make test` has a thousand cases that are
# the same every time. SEED makes those of another run again; WITH="triton cuda" adds the interpreted
# and the emulated kernels, which are slow.
CASES ?= 20000
ifndef SEED
SEED := $(shell date +%s)
endif
WITH ?=
fuzz: export OMP_WAIT_POLICY = passive
fuzz: $(VENV)/development $(if $(findstring cuda,$(WITH)),emulated-extension)
	@echo 'make fuzz CASES=$(CASES) SEED=$(SEED) WITH="$(WITH)"'
	GUARD_OPS_FUZZ_CASES=$(CASES) GUARD_OPS_FUZZ_WITH="$(WITH)" $(BIN)/python -m pytest -n 2 -q tests/fuzz \
	  --hypothesis-seed=$(SEED)

# On a machine with a GPU: device tests and benchmarks, written to benchmarks/results. Needs no
# network and no virtual environment: PYTHON's torch, triton, numpy, pytest, pytest-benchmark.
gpu-check:
	$(PYTHON) scripts/gpu_check.py

# The C++ tests: kernels and formulas without Python or torch.
test-cpp: $(VENV)/tools
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/compiling.py --tests

emulated-extension: $(VENV)/torch
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/compiling.py --emulated

lint: $(VENV)/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

format: $(VENV)/development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# Speed and accuracy against their bounds, every workload and op; the numbers are kept and the
# documents' tables and plots rewritten.
bench: $(VENV)/development
	$(BIN)/python -m pytest benchmarks -q --save-results; status=$$?; \
	  $(BIN)/python -m benchmarks.report && exit $$status

# Wheels for every device and torch that compilers can be had for; some: CELLS="cpu:2.13.0".
CELLS ?= --matrix
wheels: $(VENV)/development
	$(BIN)/python scripts/build_wheels.py $(CELLS)

# A wheel in a clean environment with its torch, and under another one; downloads gigabytes.
OTHER_TORCH ?= torch==2.14.1
wheel-check: $(VENV)/development
	GUARD_OPS_OTHER_TORCH="$(OTHER_TORCH)" $(BIN)/python -m pytest -m slow tests/test_wheels.py

clean:
	rm -rf $(VENV) build dist *.egg-info guard_ops/_C.*.so guard_ops/_C.*.json

$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.25" "ninja>=1.11"
	touch $@

$(VENV)/torch: $(VENV)/tools
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/runtime: $(VENV)/torch $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/development: $(VENV)/torch $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e ".[dev]"
	touch $(VENV)/runtime $@
