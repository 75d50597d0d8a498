"""SdeSchedule's coefficients against the formulas, at any sigmas a scheduler may have."""

import itertools
import math

import pytest
import torch
from attempt import attempt
from compare import mismatch
from hypothesis import assume, given
from hypothesis import strategies as st
from rounding import DOUBLE, Rounded
from tally import examples, tally

import guard_ops as go


@st.composite
def sigma_lists(draw):
    """Strictly decreasing, in steps from far apart to neighbours, float32's or float64's."""
    count = draw(st.integers(2, 12))
    fractions = [draw(st.floats(1e-6, 1.0)) for _ in range(count)]
    first = draw(st.sampled_from((1.0, 0.99, 0.9, 0.5, 1e-3)))
    last = draw(st.sampled_from((0.0, 1e-3 * first, 1e-7 * first)))
    total = math.fsum(fractions)
    sigmas, at = [first], first
    for f in fractions[:-1]:
        at -= f / total * (first - last)
        sigmas.append(at)
    sigmas.append(last)
    if draw(st.booleans()):
        sigmas = torch.tensor(sigmas, dtype=torch.float32).double().tolist()
    assume(all(a > b for a, b in itertools.pairwise(sigmas)))
    return sigmas


@examples(share=0.03)
@given(
    sigmas=sigma_lists(),
    noise_level=st.floats(1e-3, 1.0),
    kind=st.sampled_from(("flow_sde", "dance_sde", "wan_sde", "cps")),
)
def test_coefficients_are_the_truth(sigmas, noise_level, kind):
    schedule = go.SdeSchedule(sigmas, noise_level, kind)
    a, b, s, kappa, dt = (x.tolist() for x in schedule[:].table)
    for k, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        step = following - sigma
        if kind == "cps":
            std = following * math.sin(noise_level * math.pi / 2)
            c = math.sqrt(max(following**2 - std**2, 0.0))
            expected = [
                1 - following + c,
                -(1 - following) * sigma + c * (1 - sigma),
                std,
                1.0,
                step,
            ]
            # c loses digits where the noise level is 1 and nothing is kept of the noise before
            lost = (
                4 * DOUBLE.unit * following**2 / max(c, following * math.sqrt(DOUBLE.unit), 1e-300)
            )
        else:
            top = sigmas[1] if sigma == 1 else sigma
            shape = {"flow_sde": sigma / (1 - top) if top < 1 else 0.0, "dance_sde": 1.0}
            std = noise_level * math.sqrt(shape.get(kind, 0.0))
            if kind == "wan_sde":
                std = noise_level * sigmas[1] * sigma
            drift = std**2 / (2 * sigma) * step
            width = std * math.sqrt(-step)
            density = 1 / (2 * width**2)
            expected = [1 + drift, step + drift * (1 - sigma), width, density, step]
            lost = 8 * DOUBLE.unit * (1 + abs(drift))
        lost += 16 * DOUBLE.unit
        for name, got, right in zip(
            ["a", "b", "s", "kappa", "dt"], (a, b, s, kappa, dt), expected, strict=True
        ):
            close = got[k] == pytest.approx(right, rel=64 * DOUBLE.unit, abs=lost * (name in "ab"))
            assert close, (name, k, got[k], right)
    tally("SdeSchedule", "torch")


@examples(share=0.01)
@given(
    gap=st.sampled_from((5e-8, 6e-8, 1.2e-7, 1e-6, 1e-9, 1e-12)),
    second=st.floats(0.3, 0.98),
    above=st.booleans(),
    noise_level=st.sampled_from((0.3, 0.7, 1.0)),
)
def test_a_first_sigma_that_is_1_but_for_rounding_is_1_or_is_refused(
    gap, second, above, noise_level
):
    rest = [second, 0.2, 0.0]
    right = go.SdeSchedule([1.0, *rest], noise_level)[0]
    first = 1.0 + gap if above else 1.0 - gap
    made, refusal = attempt(lambda: go.SdeSchedule([first, *rest], noise_level)[0])
    if refusal is None:
        wrong = mismatch("s", made.s, Rounded(right.s, 1e-3 * right.s, DOUBLE))
        assert not wrong, wrong
    else:
        assert isinstance(refusal, ValueError)
        assert "sigma" in str(refusal)
    tally("SdeSchedule", "torch")
