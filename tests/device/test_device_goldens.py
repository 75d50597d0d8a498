"""The specification's own numbers on a GPU, by every backend that drives it.

The kernels compute in float32 (float64 where a backend takes it), so the float32 bounds are those
of the ``cpu`` backend in tests/test_goldens.py, against float64 on the same, rounded, numbers. By
Triton's interpreter that file itself runs.
"""

import pytest
from goldens import CASES, PAIRS, VARIANTS, check_exact, check_float32, inputs, rounded
from on_device import moved
from problems import run

# Each shape, variant and form is kernels of its own to compile; the objective is the same code in
# every form.
WITH_NOISE = ("plain", "article", "paper")
ONE_SHAPE = "17x3_K4_B8"


@pytest.mark.parametrize(
    "case, variant, form",
    [
        (case, variant, form)
        for case, variant in PAIRS
        for form in ("velocity", "noise")
        if form == "velocity" or variant in WITH_NOISE
    ],
)
def test_float32_is_close_to_float64_of_the_same_numbers(
    case, variant, form, gpu, objective_goldens
):
    config = VARIANTS[variant]
    given = rounded(inputs(objective_goldens, case, form, config))
    check_float32(given, case, variant, *run(moved(given, gpu.device), config))


@pytest.mark.parametrize("case, variant", [pair for pair in PAIRS if ONE_SHAPE in pair[0]])
def test_float64_equals_the_goldens(case, variant, gpu, objective_goldens):
    if gpu.backend == "cuda":
        pytest.skip("has no float64 kernels, and says so: test_float64_runs_too_or_is_refused")
    config = VARIANTS[variant]
    given = moved(inputs(objective_goldens, case, "velocity", config), gpu.device)
    check_exact(objective_goldens, case, variant, *run(given, config))


def test_the_goldens_have_the_shape_that_is_tested():
    assert sum(ONE_SHAPE in case for case in CASES) == 6
