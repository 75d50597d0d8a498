# `make demo` and `make test` need Python >= 3.10 and a C++20 compiler; they make .venv and reuse it.
PYTHON ?= python3
# The CPU build of torch, where the package index has one; any torch >= 2.9 will do.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cmake -name '*.h' -o -name '*.c*') CMakeLists.txt setup.py pyproject.toml \
  scripts/toolchain.py scripts/compiling.py

.PHONY: demo test test-all test-python test-cpp test-arm test-arm-bits test-slow test-triton \
  test-emulated emulated-extension fuzz sanitize gpu-check gpu-scale lint format bench docs sdist wheels wheel-check \
  test-versions kill-test study audit clean

# Modules are compiled to byte code by what imports them first, and kept, whatever the environment
# says: without it every process compiles torch's again. pip would compile all of them, of which few
# are imported. (pip reads this as the value of `compile`: what is false turns it off.)
export PIP_NO_COMPILE = 0
unexport PYTHONDONTWRITEBYTECODE

demo: $(VENV)/runtime
	$(BIN)/guard-ops demo

# Two processes of as many threads as there are cores: none may spin while it waits for another.
test test-all test-slow test-python test-triton test-emulated: export OMP_WAIT_POLICY = passive

# What every change is tested by, from an empty clone: each backend, form, norm and public function,
# and each pair of such values (tests/combinations.py). Nothing waits for what it does not need:
# compilers begin before torch is there, and tests before lint and the C++ tests have ended, so that
# two cores have work until the end.
test:
	$(MAKE) --jobs 3 lint test-cpp test-python test-triton test-emulated BESIDE=0

# How many processes test-triton and test-emulated share their work among; 0: none but their own.
BESIDE ?= 2

test-python: $(VENV)/development
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Where this machine can compile for 64-bit Arm and emulate it.
ARM_BITS := $(if $(and $(shell command -v aarch64-linux-gnu-g++),$(shell command -v qemu-aarch64-static)),test-arm-bits)

# Before a release, and after a change to kernels: what takes minutes more, such as
# every combination, machine code for every architecture, and another architecture's bits.
test-all: test
	$(MAKE) test-slow

test-slow: $(VENV)/development emulated-extension $(ARM_BITS)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow_suite
	GUARD_OPS_EMULATED=1 $(BIN)/python -m pytest -n 2 -q -m slow_suite -k cuda $(EMULATED_TESTS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q -m slow_suite $(INTERPRETED_TESTS)
	$(MAKE) fuzz CASES=1000 SEED=0
	GUARD_OPS_EVERY_CASE=1 $(MAKE) test-cpp

# The Triton kernels on the CPU, by Triton's interpreter: their own tests, and some of the others'.
INTERPRETED_TESTS := -k "triton or unusable or have_the_shape" tests/device tests/kernels \
  $(patsubst %,tests/test_%.py,goldens sde_step std_floor torch_operators life_of_a_call masks over_ranks shards)
test-triton: $(VENV)/development
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(BESIDE) -q $(INTERPRETED_TESTS)

# The CUDA kernels on an emulated device, through their backend and its bindings: their own tests, and
# the others' of the ops, but those in float64, which they have not.
EMULATED_TESTS := tests/device/test_cuda_paths.py tests/device/test_device_loss.py \
  tests/test_nonfinite.py::test_many_bad_elements_and_chunks tests/test_statistics.py \
  $(patsubst %,tests/test_%.py,autograd determinism goldens layouts masks numerics over_ranks peers sde_step shards std_floor torch_operators)
test-emulated: $(VENV)/development emulated-extension
	GUARD_OPS_EMULATED=1 $(BIN)/python -m pytest -n $(BESIDE) -q -k cuda $(EMULATED_TESTS)

# The fuzzer (tests/fuzz) for as long as one likes, where `make test` has some hundred cases that are
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

# `guard-ops train` killed at random moments and resumed, until every run has ended in the bits of one
# that was never killed: 200 kills take half an hour of one core.
KILLS ?= 200
kill-test: $(VENV)/development
	$(BIN)/python scripts/kill_and_resume.py --kills $(KILLS)

# On a machine with a GPU: device tests and benchmarks, written to benchmarks/results. Needs no
# network and no virtual environment: PYTHON's torch, triton, numpy, pytest, pytest-benchmark.
gpu-check:
	$(PYTHON) scripts/gpu_check.py

# On a machine with a GPU: an iteration of SD3.5-M and FLUX.1-dev at full size, ten minutes at most,
# written to benchmarks/results. Needs no network; PYTHON's torch, diffusers, peft, accelerate.
gpu-scale:
	$(PYTHON) scripts/gpu_scale.py

# The C++ tests: kernels and formulas without Python or torch.
test-cpp: $(VENV)/tools
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/compiling.py --tests

# The CPU kernels on an emulated 64-bit Arm processor: the bits that they compute, and the C++ tests.
test-arm: $(VENV)/tools
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/arm.py

test-arm-bits: $(VENV)/tools
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/arm.py --bits

# The C++ tests and the operators' Python tests under the address, undefined-behaviour and thread
# sanitizers.
sanitize: $(VENV)/development
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/sanitizers.py

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

# The study: which of the article's claims hold on two small tasks (docs/study.md). Three seeds took
# 32 CPU minutes besides pretraining, five take more in proportion; two runs are made at a time. It
# goes on where it was stopped, and writes the page and its figures.
study: $(VENV)/development
	$(BIN)/python -m benchmarks.study

# The documents as a site, build/site; any warning is an error. The build asks no network.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx -q -W --keep-going -E -c docs -d build/doctrees . build/site

# The source distribution, dist/guard_ops-*.tar.gz.
sdist: $(VENV)/tools
	mkdir -p dist
	$(BIN)/python -c 'from setuptools import build_meta; print(build_meta.build_sdist("dist"))'

# Wheels for every device and torch that compilers can be had for; some: CELLS="cpu:2.13.0".
CELLS ?= --matrix
wheels: $(VENV)/development
	$(BIN)/python scripts/build_wheels.py $(CELLS)

# A wheel in a clean environment with its torch, and under another one; downloads gigabytes.
OTHER_TORCH ?= torch==2.14.1
wheel-check: $(VENV)/development
	GUARD_OPS_OTHER_TORCH="$(OTHER_TORCH)" $(BIN)/python -m pytest -m slow tests/test_wheels.py

# The Python tests under the oldest and the newest torch and Triton; downloads gigabytes.
test-versions:
	$(PYTHON) scripts/test_versions.py

# Known vulnerabilities of what CI installs; asks a database in the network. Without --strict, packages
# that it could not look up would count as having none.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet pip-audit
	build/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement .ci/requirements.txt

clean:
	rm -rf $(VENV) build dist *.egg-info guard_ops/_C.*.so guard_ops/_C.*.json

# Under LOCKED=1, as CI has it, the versions and hashes in .ci come first, so that whatever is asked
# for afterwards is in place. torch is of the version TORCH, and gets what it needs from there.
locked = $(if $(LOCKED),$(BIN)/pip install --quiet --no-deps --require-hashes -r .ci/$(1))

$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(call locked,build.txt)
	$(BIN)/pip install --quiet "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.25" "ninja>=1.11"
	touch $@

$(VENV)/torch: $(VENV)/tools
	$(BIN)/pip install --quiet $(if $(LOCKED),--no-deps) "$(TORCH)"
	touch $@

$(VENV)/runtime: $(VENV)/torch $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/docs: $(VENV)/torch $(SOURCES)
	$(call locked,docs.txt)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e ".[docs]"
	touch $@

$(VENV)/development: $(VENV)/torch $(SOURCES)
	$(call locked,requirements.txt)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e ".[dev]"
	touch $(VENV)/runtime $@
