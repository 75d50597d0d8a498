"""SdeSchedule and StepCoefficients: the table of docs/math.md, indexing, refusals."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

import guard_ops as go

SIGMAS = [1.0, 0.9, 0.6, 0.25, 0.0]
FIELDS = ("a", "b", "s", "kappa", "dt")


def by_hand(kind, eta, k):
    """The specification's table, in math's floats."""
    sigma, following = SIGMAS[k], SIGMAS[k + 1]
    dt = following - sigma
    if kind == "cps":
        std = following * math.sin(eta * math.pi / 2)
        c = math.sqrt(following**2 - std**2)
        return (1 - following) + c, -(1 - following) * sigma + c * (1 - sigma), std, 1.0, dt
    std = eta
    if kind == "flow_sde":
        std = eta * math.sqrt(sigma / (1 - (SIGMAS[1] if sigma == 1 else sigma)))
    if kind == "wan_sde":
        std = eta * SIGMAS[1] * sigma
    a = 1 + std**2 / (2 * sigma) * dt
    b = (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    s = std * math.sqrt(-dt)
    return a, b, s, 1 / (2 * s**2), dt


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "wan_sde", "cps"])
@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_the_table_of_the_specification(kind, eta):
    schedule = go.SdeSchedule(SIGMAS, noise_level=eta, kind=kind)
    assert len(schedule) == 4
    for k in range(3 if kind == "cps" else 4):
        for name, expected in zip(FIELDS, by_hand(kind, eta, k), strict=True):
            value = getattr(schedule[k], name)
            assert value.dtype == torch.float64
            assert value.item() == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_numbers_worked_out_on_paper():
    """sigma 0.5 -> 0.3, eta 0.4: std^2 = 0.16 * 0.5 / 0.5."""
    step = go.SdeSchedule([0.5, 0.3, 0.0], noise_level=0.4)[0]
    assert step.dt.item() == pytest.approx(-0.2)
    assert step.a.item() == pytest.approx(1 - 0.16 * 0.2)
    assert step.b.item() == pytest.approx(-(1 + 0.16 * 0.5) * 0.2)
    assert step.s.item() == pytest.approx(0.4 * math.sqrt(0.2))
    assert step.kappa.item() == pytest.approx(1 / (2 * 0.16 * 0.2))


def test_without_noise_every_kind_is_the_ode():
    """eta 0: flow and dance take the Euler step x + dt v; cps interpolates to the same."""
    for kind in ("flow_sde", "dance_sde", "wan_sde", "cps"):
        for step in go.SdeSchedule(SIGMAS, noise_level=0, kind=kind):
            assert step.a.item() == pytest.approx(1.0, abs=1e-15)
            assert step.b.item() == pytest.approx(step.dt.item(), rel=1e-14)
            assert step.s.item() == 0
            assert step.deterministic == (0,)


def test_cps_keeps_the_marginal_on_a_straight_flow():
    """With v = x1 - x0, the mean plus noise of variance s^2 has sigma_next of noise in all."""
    schedule = go.SdeSchedule(SIGMAS, noise_level=0.6, kind="cps")
    for k in range(4):
        a, b, s = schedule[k].a, schedule[k].b, schedule[k].s
        sigma, following = SIGMAS[k], SIGMAS[k + 1]
        # x = (1 - sigma) x0 + sigma x1 and v = x1 - x0: coefficients of x0 and x1 in the mean.
        assert (a * (1 - sigma) - b).item() == pytest.approx(1 - following, rel=1e-14)
        noise = (a * sigma + b) ** 2 + s**2
        assert noise.item() == pytest.approx(following**2, rel=1e-13, abs=1e-15)


def test_only_the_last_step_of_cps_is_deterministic():
    assert go.SdeSchedule(SIGMAS, kind="cps")[:].deterministic == (3,)
    assert go.SdeSchedule(SIGMAS, kind="cps")[1:3].deterministic == ()
    assert go.SdeSchedule(SIGMAS)[:].deterministic == ()


@pytest.mark.parametrize(
    "index, steps",
    [
        (slice(None), [0, 1, 2, 3]),
        (slice(1, 3), [1, 2]),
        (slice(-2, None), [2, 3]),
        (slice(None, None, 2), [0, 2]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        ([2, 0], [2, 0]),
        ((1, -1), [1, 3]),
        (range(2), [0, 1]),
        (torch.tensor([3, 1, 1]), [3, 1, 1]),
        (torch.tensor([-1, 0]), [3, 0]),
        (torch.tensor([[0, 1], [2, 3], [1, 1]]), [[0, 1], [2, 3], [1, 1]]),
    ],
    ids=str,
)
def test_indexing(index, steps):
    schedule = go.SdeSchedule(SIGMAS)
    got = schedule[index]
    assert got.shape == torch.tensor(steps).shape
    for name in FIELDS:
        expected = torch.stack([getattr(schedule[k], name) for k in range(4)])[torch.tensor(steps)]
        assert torch.equal(getattr(got, name), expected)


def test_one_step_and_iteration():
    schedule = go.SdeSchedule(SIGMAS)
    assert schedule[2].shape == schedule[torch.tensor(2)].shape == ()
    assert torch.equal(schedule[-1].table, schedule[3].table)
    assert [step.dt.item() for step in schedule] == schedule[:].dt.tolist()


@pytest.mark.parametrize(
    "index, exception, message",
    [
        (4, ValueError, "`k` is 4, out of range for the 4 steps of this schedule"),
        (-5, ValueError, "`k` is -5, out of range for the 4 steps"),
        ([0, 7], ValueError, "`k` is 7, out of range for the 4 steps"),
        (torch.tensor([0, 4]), ValueError, "`k` is 4, out of range for the 4 steps"),
        (torch.tensor([[0], [-9]]), ValueError, "`k` is -9, out of range for the 4 steps"),
        (slice(3, 2), ValueError, "`k` is slice(3, 2, None), which selects none of the 4 steps"),
        ([], ValueError, "`k` is [], which selects none of the 4 steps"),
        (True, TypeError, "`k` is True (bool); it needs an int, slice, list or LongTensor"),
        (1.0, TypeError, "`k` is 1.0 (float); it needs an int, slice, list or LongTensor"),
        ("1", TypeError, "`k` is '1' (str); it needs an int, slice, list or LongTensor"),
        ([0.5], TypeError, "`k` is a list; it needs an int, slice, list or LongTensor"),
        (
            torch.tensor([0], dtype=torch.int32),
            TypeError,
            "`k` is a torch.int32 tensor of shape (1,); it needs dtype torch.int64",
        ),
        (
            torch.zeros(1, 1, 1, dtype=torch.int64),
            ValueError,
            "`k` has shape (1, 1, 1); it needs [], [K] or [K, B]",
        ),
        (torch.zeros(0, dtype=torch.int64), ValueError, "`k` has shape (0,); it needs []"),
        (
            torch.zeros(2, dtype=torch.int64, device="meta"),
            ValueError,
            "`k` is on meta but the schedule on cpu; use schedule.to(device)",
        ),
    ],
    ids=str,
)
def test_bad_indices(index, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        go.SdeSchedule(SIGMAS)[index]


@pytest.mark.parametrize(
    "arguments, exception, message",
    [
        (([1.0],), ValueError, "`sigmas` has 1 values; it needs at least 2 (one step)"),
        (([1.0, 0.5, 0.5],), ValueError, "`sigmas[2]` is 0.5 after 0.5; sigmas must strictly"),
        (([0.2, 0.5],), ValueError, "`sigmas[1]` is 0.5 after 0.2; sigmas must strictly decrease"),
        (([1.2, 0.5],), ValueError, "`sigmas[0]` is 1.2; a flow's sigmas lie within [0, 1]"),
        (([1.0, -0.1],), ValueError, "`sigmas[1]` is -0.1; a flow's sigmas lie within [0, 1]"),
        (([1.0, math.nan],), ValueError, "`sigmas[1]` is nan; a flow's sigmas lie within [0, 1]"),
        (("abc",), TypeError, "`sigmas[0]` is 'a' (str); it needs a number"),
        ((3.0,), TypeError, "`sigmas` is 3.0 (float); it needs a sequence of floats"),
        (
            (torch.ones(2, 2),),
            ValueError,
            "`sigmas` is a torch.float32 tensor of shape (2, 2) on cpu; it needs one dimension",
        ),
        (
            (torch.tensor([1, 0]),),
            ValueError,
            "`sigmas` is a torch.int64 tensor of shape (2,) on cpu; it needs one dimension of",
        ),
        (
            (SIGMAS, 0.7, "ddim"),
            ValueError,
            "`kind` is 'ddim'; it needs one of flow_sde, dance_sde",
        ),
        (
            (SIGMAS, -0.1),
            ValueError,
            "`noise_level` is -0.1; flow_sde needs 0 <= noise_level < inf",
        ),
        ((SIGMAS, math.inf), ValueError, "`noise_level` is inf; flow_sde needs 0 <= noise_level"),
        ((SIGMAS, math.nan), ValueError, "`noise_level` is nan; flow_sde needs 0 <= noise_level"),
        ((SIGMAS, 1.5, "cps"), ValueError, "`noise_level` is 1.5; cps needs 0 <= noise_level <= 1"),
        ((SIGMAS, "0.7"), TypeError, "`noise_level` is '0.7' (str); it needs a number"),
        ((SIGMAS, True), TypeError, "`noise_level` is True (bool); it needs a number"),
    ],
)
def test_bad_schedules(arguments, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        go.SdeSchedule(*arguments)


def test_from_a_diffusers_scheduler():
    """Only its ``sigmas`` tensor is read; float32, as diffusers has it."""
    sigmas = torch.tensor(SIGMAS, dtype=torch.float32)
    schedule = go.SdeSchedule.from_scheduler(SimpleNamespace(sigmas=sigmas), 0.5, "dance_sde")
    expected = go.SdeSchedule(sigmas, 0.5, "dance_sde")
    assert torch.equal(schedule[:].table, expected[:].table)
    assert schedule.sigmas == tuple(sigmas.tolist())
    with pytest.raises(
        TypeError, match="`scheduler` is a SimpleNamespace without a tensor `sigmas`"
    ):
        go.SdeSchedule.from_scheduler(SimpleNamespace(sigmas=SIGMAS))
    with pytest.raises(ValueError, match=re.escape("`sigmas[0]` is 14.6")):
        go.SdeSchedule.from_scheduler(SimpleNamespace(sigmas=torch.tensor([14.6, 0.0])))


def test_moving_to_a_device():
    schedule = go.SdeSchedule(torch.tensor(SIGMAS), 0.4, "cps")
    assert schedule.device == torch.device("cpu")
    moved = schedule.to("meta")
    assert moved.device == moved[:2].device == torch.device("meta")
    assert (moved.noise_level, moved.kind, moved.sigmas) == (0.4, "cps", schedule.sigmas)
    assert schedule[1:3].to("meta").shape == (2,)
    assert schedule[:].to("meta").deterministic == (3,)
    assert schedule[:].to("meta").gaussian is False


def test_repr_says_what_it_is():
    assert repr(go.SdeSchedule(SIGMAS)) == "SdeSchedule(steps=4, noise_level=0.7, kind='flow_sde')"
    assert repr(go.SdeSchedule(SIGMAS)[1:]) == "StepCoefficients(shape=(3,), device='cpu')"


def ones(**changes):
    named = {name: torch.ones(3, dtype=torch.float64) for name in FIELDS} | {"dt": -torch.ones(3)}
    return go.StepCoefficients(**named | changes)


def test_coefficients_of_ones_own():
    coeffs = ones(s=torch.tensor([0.5, 0.0, 0.25]))
    assert coeffs.shape == (3,)
    assert coeffs.dt.dtype == torch.float64
    assert coeffs.s.tolist() == [0.5, 0.0, 0.25]
    assert coeffs.deterministic == (1,)
    assert coeffs.gaussian


@pytest.mark.parametrize(
    "changes, exception, message",
    [
        ({"b": 1.0}, TypeError, "`b` is 1.0 (float); it needs a floating tensor"),
        (
            {"kappa": torch.ones(3, dtype=torch.int64)},
            TypeError,
            "`kappa` is a torch.int64 tensor of shape (3,); it needs a floating tensor",
        ),
        ({"s": torch.ones(2)}, ValueError, "`s` has shape (2,) on cpu but `a` (3,) on cpu"),
        ({"dt": torch.ones(3, device="meta")}, ValueError, "`dt` has shape (3,) on meta but `a`"),
        (
            {name: torch.ones(1, 1, 1) for name in FIELDS},
            ValueError,
            "`a` has shape (1, 1, 1); it needs [], [K] or [K, B]",
        ),
        ({"s": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "`s` has a negative value"),
        ({"b": torch.tensor([1.0, math.nan, 1.0])}, ValueError, "`b` "),
        ({"a": torch.tensor([1.0, math.inf, 1.0])}, ValueError, "`a` "),
        ({"s": torch.tensor([1.0, math.nan, 1.0])}, ValueError, "`s` "),
        ({"dt": torch.tensor([-1.0, 0.5, -1.0])}, ValueError, "`dt` "),
    ],
    ids=str,
)
def test_bad_coefficients(changes, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        ones(**changes)


# ---- sigmas that are 1 but for rounding or a margin --------------------------------------------


def flux_sigmas(shift: float, steps: int) -> torch.Tensor:
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def sane(schedule: go.SdeSchedule) -> bool:
    """Whether the first step draws noise of about eta, and moves towards the mean."""
    first = schedule[0]
    eta = schedule.noise_level
    return 0 < first.s.item() <= 1.01 * eta and 0 < first.a.item() <= 1


def test_rounding_of_the_first_sigma_changes_nothing():
    """Shifts of 241 token counts: exp of a linear function of 256 ... 4096 tokens, as FLUX has it.

    In float32 sigma[0] comes out as 1, 0.99999994 or 1.0000001.
    """
    first = set()
    for tokens in range(256, 4097, 16):
        shift = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
        sigmas = flux_sigmas(shift, 10)
        first.add(sigmas[0].item())
        step = go.SdeSchedule(sigmas)[0]
        exact = go.SdeSchedule([1.0, *sigmas[1:].tolist()])[0]
        assert torch.allclose(
            step.table[:3], exact.table[:3], rtol=1e-5, atol=0
        )  # 6e-8 of a dt of 0.05
        assert step.s.item() == pytest.approx(0.7, rel=1e-5)
    assert min(first) < 1 < max(first)  # else this tests nothing


def test_a_sigma_that_rounding_put_above_one_is_one():
    assert go.SdeSchedule([1.0000001, 0.5, 0.0]).sigmas[0] == 1.0
    with pytest.raises(ValueError, match=r"`sigmas\[0\]` is 1.00001; a flow's sigmas lie within"):
        go.SdeSchedule([1.00001, 0.5, 0.0])


def test_a_first_sigma_that_is_far_enough_from_one_keeps_the_formula():
    """A short first step, one that is not the first, and one that begins too far from 1."""
    for sigmas, k in (([0.999, 0.9985, 0.5], 0), ([1.0, 0.9995, 0.5], 1), ([0.99, 0.5, 0.0], 0)):
        sigma, following = sigmas[k], sigmas[k + 1]
        std = 0.7 * math.sqrt(sigma / (1 - sigma))
        got = go.SdeSchedule(sigmas)[k].s.item()
        assert got == pytest.approx(std * math.sqrt(sigma - following), rel=1e-12)


FLOWS = {
    "FlowMatchEulerDiscreteScheduler": lambda shift: {"shift": shift},
    "FlowMatchLCMScheduler": lambda shift: {"shift": shift},
    "UniPCMultistepScheduler": lambda shift: {"flow_shift": shift},
    "DPMSolverMultistepScheduler": lambda shift: {"flow_shift": shift},
    "DPMSolverSinglestepScheduler": lambda shift: {"flow_shift": shift},
}


@pytest.mark.parametrize("name", FLOWS)
def test_every_flow_scheduler_of_diffusers_begins_sanely(name):
    diffusers = pytest.importorskip("diffusers")
    for shift in (1.0, 1.15, 1.726405785426307, 3.0, 5.0, 8.0, 12.0):
        settings = FLOWS[name](shift)
        if "flow_shift" in settings:
            settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        scheduler = getattr(diffusers, name)(**settings)
        for steps in (4, 8, 10, 20, 28, 50):
            scheduler.set_timesteps(steps)
            assert sane(go.SdeSchedule.from_scheduler(scheduler)), (shift, steps)


def test_flux_dynamic_shifts_begin_sanely():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens in range(256, 4097, 192):
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        for steps in (10, 28, 50):
            line = torch.linspace(1, 1 / steps, steps).tolist()
            scheduler.set_timesteps(sigmas=line, mu=mu)
            assert sane(go.SdeSchedule.from_scheduler(scheduler)), (tokens, steps)


@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_scheduler_that_repeats_sigmas_is_refused_with_the_remedy(name):
    diffusers = pytest.importorskip("diffusers")
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = getattr(diffusers, name)(**(flow if name.startswith("DEIS") else {}))
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=rf"`scheduler` is a {name}, .*unique_consecutive\(\)"):
        go.SdeSchedule.from_scheduler(scheduler)
    assert sane(go.SdeSchedule(scheduler.sigmas.unique_consecutive()))


def test_a_scheduler_before_set_timesteps_is_refused():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(
        ValueError, match=r"with the 1000 sigmas of its training; call its set_time"
    ):
        go.SdeSchedule.from_scheduler(scheduler)


# ---- numbers of which no table can be made ------------------------------------------------------


@pytest.mark.parametrize(
    "sigmas, noise_level, number",
    [
        ([1.0, 0.8, 0.0], 1e-155, "kappa"),
        ([1.0, 0.8, 0.0], 1e160, "a"),
        ([5e-324, 0.0], 0.7, "kappa"),
    ],
)
def test_a_table_that_is_not_finite_is_refused(sigmas, noise_level, number):
    message = rf"`noise_level` is {noise_level} and .* step 0's {number} is not a finite number"
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        go.SdeSchedule(sigmas, noise_level)


@pytest.mark.parametrize("name", FIELDS)
def test_coefficients_are_constants(name):
    numbers = dict(zip(FIELDS, go.SdeSchedule([0.9, 0.5])[:].table, strict=True))
    numbers[name] = numbers[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"`{name}` requires grad but coefficients are constants"):
        go.StepCoefficients(**numbers)
    with torch.no_grad():
        go.StepCoefficients(**numbers)


def test_a_schedule_made_while_a_model_is_only_described_has_its_numbers():
    expected = go.SdeSchedule([0.9, 0.5, 0.0])
    with torch.device("meta"):
        schedule = go.SdeSchedule([0.9, 0.5, 0.0])
    assert schedule.device.type == "cpu"
    assert torch.equal(schedule[:].table, expected[:].table)
    assert go.SdeSchedule([0.9, 0.5], device="meta")[0].s.device.type == "meta"


@pytest.mark.parametrize("device", ["", "gpu", 7.0, -1, b"cpu"])
def test_what_names_no_device_is_refused(device):
    for make in (
        lambda: go.SdeSchedule([0.9, 0.5], device=device),
        lambda: go.SdeSchedule([0.9, 0.5]).to(device),
        lambda: go.SdeSchedule([0.9, 0.5])[0].to(device),
        lambda: go.philox_seed(1, (2,), device),
        lambda: go.RatioStatistics(2, device),
    ):
        with pytest.raises((ValueError, TypeError), match=r"`device` is "):
            make()


@pytest.mark.parametrize("sigmas", ["10", [True, False], ["0.9", "0.5"], 3, None])
def test_what_are_no_numbers_are_no_sigmas(sigmas):
    with pytest.raises(TypeError, match=r"`sigmas(\[0\])?` is .*; it needs a (number|sequence)"):
        go.SdeSchedule(sigmas)
