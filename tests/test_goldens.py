"""The specification's own numbers: tests/data/objective_f64.npz, every case and variant."""

import re

import pytest
import torch
from combinations import pairs_first
from goldens import (
    CASES,
    PAIRS,
    VARIANTS,
    check_exact,
    check_float32,
    coefficients,
    inputs,
    rounded,
)
from problems import run


def parts(case, variant, form):
    """A case is a kind of SDE, a shape and a drift."""
    return *re.fullmatch(r"(.+?)_(\d.+)_(drift.+)", case).groups(), variant, form


def test_the_file_holds_exactly_the_cases_that_are_tested(objective_goldens):
    assert sorted(CASES) == objective_goldens.cases
    for case in CASES:
        expected = {variant for name, variant in PAIRS if name == case}
        assert set(objective_goldens.variants(case)) == expected


@pytest.mark.parametrize("case", CASES)
def test_schedule_coefficients(case, objective_goldens):
    coeffs = coefficients(objective_goldens, case)
    for name in ("a", "b", "s", "kappa", "dt"):
        expected = objective_goldens[f"{case}/{name}"]
        torch.testing.assert_close(getattr(coeffs, name), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "case, variant, form",
    pairs_first(
        (
            (case, variant, form)
            for case, variant in PAIRS
            for form in ("velocity", "mean", "noise", "log-prob")
            if not (form == "log-prob" and variant.startswith("paper"))  # does not know kl_old
        ),
        parts,
    ),
)
def test_float64_equals_the_goldens(case, variant, form, backend, objective_goldens):
    config = VARIANTS[variant]
    out, grad = run(inputs(objective_goldens, case, form, config), config)
    check_exact(objective_goldens, case, variant, out, grad)


# Float32 inputs carry 6e-8 each; in these forms nothing magnifies it. (The mean form's delta is a
# difference of rounded means: test_numerics.py has its own bound.)
@pytest.mark.parametrize(
    "case, variant, form",
    pairs_first(((*pair, form) for pair in PAIRS for form in ("velocity", "noise")), parts),
)
def test_float32_is_close_to_float64_of_the_same_numbers(
    case, variant, form, fused_backend, objective_goldens
):
    config = VARIANTS[variant]
    given = rounded(inputs(objective_goldens, case, form, config))
    check_float32(given, case, variant, *run(given, config))
