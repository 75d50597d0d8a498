# `make demo` and `make test` need Python >= 3.10 and a C++20 compiler; they make .venv and reuse it.
PYTHON ?= python3
# The CPU build of torch, where the package index has one; any torch >= 2.9 will do.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cmake -name '*.h' -o -name '*.c*') CMakeLists.txt setup.py pyproject.toml \
  scripts/toolchain.py scripts/compiling.py

.PHONY: demo test test-cpp test-triton test-emulated gpu-check lint format bench wheels wheel-check clean

demo: $(VENV)/runtime
	$(BIN)/guard-ops demo

# Two processes of as many threads as there are cores: none may spin while it waits for another.
test test-triton test-emulated: export OMP_WAIT_POLICY = passive

test: lint test-cpp
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(MAKE) test-triton test-emulated

# The Triton kernels on the CPU, by Triton's interpreter: their own tests, and some of the others'.
test-triton: $(VENV)/development
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q tests/device tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q tests/test_goldens.py tests/test_sde_step.py \
	  tests/test_torch_operators.py \
	  -k "triton and not cps and not K3 and not K2 and not 0.001"

# The CUDA kernels on an emulated device, through their backend and its bindings: their own tests, and
# the others' of the ops, but those in float64.
test-emulated: $(VENV)/development
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/compiling.py --emulated
	GUARD_OPS_EMULATED=1 $(BIN)/python -m pytest -n 2 -q -k cuda --ignore tests/device/test_triton_launch_paths.py \
	  tests/device $(patsubst %,tests/test_%.py, \
	  autograd determinism goldens layouts nonfinite numerics peers plain_call sde_step \
	  single_sample statistics torch_operators)

# On a machine with a GPU: device tests and benchmarks, written to benchmarks/results. Needs no
# network and no virtual environment: PYTHON's torch, triton, numpy, pytest, pytest-benchmark.
gpu-check:
	$(PYTHON) scripts/gpu_check.py

# The C++ tests: kernels and formulas without Python or torch.
test-cpp: $(VENV)/development
	$(BIN)/cmake -G Ninja -S . -B build/cpp -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DGUARD_OPS_EXTENSION=OFF -DGUARD_OPS_TESTS=ON
	$(BIN)/cmake --build build/cpp
	$(BIN)/ctest --test-dir build/cpp --output-on-failure -j 2

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

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.25" "ninja>=1.11"
	touch $@

$(VENV)/runtime: $(VENV)/torch $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/development: $(VENV)/runtime
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@
