"""Fixtures over the backends that this machine has, and the golden vectors."""

from __future__ import annotations

import os
import re
from pathlib import Path

import emulated
import numpy as np
import pytest
import torch

if emulated.EMULATED:
    emulated.prepare()

import guard_ops as go

pytest.register_assert_rewrite("goldens")
DATA = Path(__file__).parent / "data"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # `make test`'s second run of some files
collect_ignore = [] if INTERPRETED or emulated.EMULATED or torch.cuda.is_available() else ["device"]
if INTERPRETED:
    import interpreter

    interpreter.prepare()

from runnable import BACKENDS  # noqa: E402


class Goldens:
    """A ``.npz`` of keys ``case/array`` and ``case/variant/array``."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / name) as file:
            self._arrays = {key: file[key] for key in file.files}
        self.cases = sorted({key.split("/")[0] for key in self._arrays})

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self._arrays[key])).clone()

    def variants(self, case: str) -> list[str]:
        """Of the cases' three-part keys, the middle parts."""
        parts = [key.split("/") for key in self._arrays if key.startswith(f"{case}/")]
        return sorted({part[1] for part in parts if len(part) == 3})


@pytest.fixture(scope="session")
def objective_goldens() -> Goldens:
    return Goldens("objective_f64.npz")


@pytest.fixture(scope="session")
def peer_goldens() -> Goldens:
    return Goldens("peers_f32.npz")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every backend in turn, in use while the test runs."""
    with go.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def fused_backend(request):
    """Every backend but ``reference``, in use while the test runs."""
    with go.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _reproducible(request):
    """No test depends on another's random numbers or thread count.

    Those of the ops run on one thread, so that they may share the machine with other workers;
    test_determinism.py asks for more.
    """
    threads = torch.get_num_threads()
    # torch.manual_seed takes milliseconds to format a stack for each kind of device there could be.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    if request.path.parent == DATA.parent:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# What is left to `make test-slow`, as a case takes seconds and others test what it does: of every
# run; of that on an emulated device or by Triton's interpreter, where what torch traces is not the
# kernels' and their bits are compared by every path; and by the interpreter alone, where a kind of
# SDE is other numbers for the same kernel, and each form is tested with each norm, and with a mask,
# by the cases that stay.
SLOW_SUITE = [r"compiles_into_one_graph\[reference-seeded"]
SLOW_IN_SOFTWARE = [
    r"number_of_threads",
    r"allocate_the_gradient(?!.*-mean-article-dtype0)",
    r"runs_repeat_bit_for_bit",
    r"excess_survives_float32",
    r"compiles_with_symbolic_numbers",
    r"compiles_into_one_graph\[.*-seeded",
    r"custom_objective_over_log_ratio_compiles",
    r"more_samples_than_one_program_holds_in_one_graph",
    r"test_over_ranks.*(on_policy.*-(mean|noise|seeded)|differentiated.*dtype0|both_outputs)",
    r"test_device_loss.*every_size_of_latent.*-seeded-(2-7|2-4097|None-9000)",
]
SLOW_INTERPRETED = [
    r"test_goldens.*float32_is_close.*-(dance_sde|cps|flow_sde_(257|2x3x4x5))_",
    r"test_goldens.*float64_equals.*-(dance_sde|cps)_(?!4x6x6_K3_B5_drift0\.3)",
    r"test_masks.*a_masked_element_holds.*-(mean|noise|seeded|log-prob)-latent[12]",
    r"test_masks.*a_masked_loss_is_that.*-(mean|noise|log-prob)-(paper|plain)",
    r"test_device_loss.*every_size_of_latent.*-seeded-2-(1|127)\]",
]

# Taken first, in this order: a process that begins one of them last is waited for by the other.
LONGEST = ["demo", "torch_operators", "resume_after_kill", "gradients", "numerics", "determinism"]
LONGEST += ["install", "goldens", "fuzz_loss", "fuzz_log_ratio", "package", "extension"]


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """Longest files first; on an emulated device, without what is in float64, which it has not."""
    slow = [*SLOW_SUITE, *(SLOW_IN_SOFTWARE if emulated.EMULATED or INTERPRETED else [])]
    slow = re.compile("|".join([*slow, *(SLOW_INTERPRETED if INTERPRETED else [])]))
    for item in items:
        if slow.search(item.nodeid):
            item.add_marker(pytest.mark.slow_suite)
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    if emulated.EMULATED:
        wide = {item for item in items if item.path.parent == DATA.parent and in_float64(item)}
        config.hook.pytest_deselected(items=list(wide))
        items[:] = [item for item in items if item not in wide]


def in_float64(item: pytest.Item) -> bool:
    """Whether a test's name or a parameter of it says so."""
    if re.match(r"test_float64_|\w+_in_float64\b", item.name):
        return True
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    several = [value if isinstance(value, tuple) else (value,) for value in parameters]
    return any(one is torch.float64 for values in several for one in values)


if emulated.EMULATED:

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(item):
        """The CUDA kernels refuse float64, which half of the tests are in."""
        try:
            return (yield)
        except TypeError as error:
            if not emulated.refused_for_float64(error):
                raise
            pytest.skip("the CUDA kernels have no float64")
