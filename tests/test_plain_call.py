"""The call checked in C++ against Python's checks: the same views, nothing more accepted."""

import itertools
import random

import pytest
import torch
from problems import FORMS, problem

import guard_ops as go
from guard_ops import backends, loss_call
from guard_ops.transitions import LossArguments

pytestmark = pytest.mark.skipif(
    "cpu" not in go.available_backends(), reason="the extension is not built"
)
ARGUMENTS = LossArguments._fields


def arguments(given):
    given = {name: given.get(name) for name in ARGUMENTS}
    return LossArguments(**given | {"config": given["config"] or go.GuardConfig()})


def in_python(given):
    return loss_call.check(arguments(given))


def plainly(given, *, keep=True):
    """What is accepted in one step, or None."""
    refusal = None
    try:
        plain = loss_call.plain_call(arguments(given), keep=keep)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # of the objective
        refusal = error
    if refusal is not None:
        with pytest.raises(type(refusal)) as caught:
            in_python(given)
        assert str(caught.value) == str(refusal)
        return None
    return None if plain is None else loss_call.of(plain, arguments(given))


def assert_same(got, want):
    assert got.fused
    assert got.backend is want.backend
    assert got.shape == want.shape
    assert got.t.guidance_scale == want.t.guidance_scale
    pairs = [*zip(got.t[:-1], want.t[:-1], strict=True)]
    pairs += [*zip(got.problem[:4], want.problem[:4], strict=True)]
    for mine, other in pairs:
        if other is None:
            assert mine is None
            continue
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)
        assert mine.data_ptr() == other.data_ptr()  # a view of the same memory
        assert not mine.requires_grad
        for size, stride, expected in zip(mine.shape, mine.stride(), other.stride(), strict=True):
            assert size == 1 or stride == expected
    assert got.problem[4:] == want.problem[4:]


def as_trainers_hold_them(tensor):
    """A [K, B, ...] view of a trajectory stored [B, K, ...]."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [None, 1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_the_usual_calls_are_accepted_with_the_same_views(form, steps, dtype, guided):
    given = problem(form, steps=steps, dtype=dtype, guided=guided)
    given["advantages"] = given["advantages"].float()
    given["model_output"] = given["model_output"].requires_grad_()
    if steps == 3:
        given |= {"step_weights": torch.rand(3, 4), "advantages": torch.randn(3, 4)}
        for name in ("sample", "prev_sample", "old_model_output", "old_mean", "noise"):
            if name in given:
                given[name] = as_trainers_hold_them(given[name])
    got = plainly(given)
    assert got is not None
    assert_same(got, in_python(given))


def test_coefficients_of_every_shape_are_expanded():
    given = problem("noise", dtype=torch.float32)
    for index in (slice(1, 4), torch.tensor([[1, 2, 3, 4]] * 3)):
        given["coeffs"] = go.SdeSchedule((1, 0.9, 0.75, 0.55, 0.3, 0.1, 0), 0.7)[index]
        assert_same(plainly(given), in_python(given))


class Subclass(torch.Tensor):
    pass


def changes_of(value):
    """What may be wrong or unusual about one argument."""
    yield None
    yield 1.5
    if isinstance(value, go.StepCoefficients):
        for table in changes_of(value.table):
            if isinstance(table, torch.Tensor):
                yield go.StepCoefficients._of(table, True, ())
        yield go.StepCoefficients._of(value.table, True, (2,))  # deterministic
    if not isinstance(value, torch.Tensor):
        return
    yield value.tolist()
    yield value.as_subclass(Subclass)
    yield value[..., :-1]
    yield value[None]
    yield value[:0]
    yield value[:-1]
    yield torch.cat([value, value])
    yield value.to("meta")
    yield value.to(torch.int32)
    yield value.to_sparse()
    yield value.mT if value.ndim > 1 else value.flip(0)
    yield value.repeat_interleave(2, -1)[..., ::2]  # not dense
    yield value[..., :1].expand_as(value)
    if value.is_floating_point():
        yield value.to(torch.complex64)
        yield value.to(torch.float16)
        yield torch._neg_view(value)
        yield value.detach().requires_grad_()


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_accepted_that_python_would_refuse_or_see_otherwise(form, steps):
    given = problem(form, steps=steps, dtype=torch.float32, guided=True, reference=True)
    given["config"] = go.GuardConfig(kl_beta=0.1)
    given["advantages"] = given["advantages"].float()
    given["step_weights"] = torch.rand(given["model_output"].shape[: 1 if steps is None else 2])
    names = [name for name in ARGUMENTS if name not in ("config", "statistics", "process_group")]
    cases = [{name: change} for name in names for change in changes_of(given.get(name))]
    cases += [{name: given["model_output"].detach()} for name in names if name not in given]
    draw = random.Random(0).sample
    cases += [a | b for a, b in draw([*itertools.combinations(cases, 2)], 400)]
    accepted = 0
    for case in cases:
        call = {**given, **case}
        got = plainly(call)
        if got is None:
            continue
        accepted += 1
        assert_same(got, in_python(call))  # raises where Python refuses
    assert 0 < accepted < len(cases) / 2


def test_constants_that_require_grad_are_refused_under_grad_mode_only():
    given = problem("velocity", dtype=torch.float32)
    given["advantages"] = given["advantages"].float()
    given["sample"] = given["sample"].requires_grad_()
    assert plainly(given) is None
    with torch.no_grad():
        assert plainly(given) is not None


@pytest.mark.parametrize("grad_mode", [False, True])
def test_without_a_backward_constants_that_require_grad_are_always_refused(grad_mode):
    given = problem("velocity", dtype=torch.float32)
    given["advantages"] = given["advantages"].float()
    with torch.set_grad_enabled(grad_mode):
        assert plainly(given, keep=False) is not None
        given["sample"] = given["sample"].requires_grad_()
        assert plainly(given, keep=False) is None
        with pytest.raises(ValueError, match="`sample` requires grad"):
            go.guard_loss_and_grad(**given)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_are_those_of_the_call_checked_in_python(
    form, steps, guided, monkeypatch
):
    given = problem(form, steps=steps, dtype=torch.float32, guided=guided)
    given["advantages"] = given["advantages"].float()
    assert plainly(given, keep=False) is not None
    got = go.guard_loss_and_grad(**given)
    with monkeypatch.context() as patch:
        patch.setattr(loss_call, "_plain_call", None)
        want = go.guard_loss_and_grad(**given)
    assert torch.equal(got.loss, want.loss)
    assert not got.loss.requires_grad
    grads = [x if guided else (x,) for x in (got.grad, want.grad)]
    for mine, other in zip(*grads, strict=True):
        assert torch.equal(mine, other)
        assert mine.shape == given["model_output"].shape
        assert mine.stride() == other.stride()


def test_every_gradient_that_a_backend_is_handed_is_flat(backend, monkeypatch):
    if not backends._loaded[backend].FUSED:
        pytest.skip("makes its gradient in backward")
    seen = []
    scaled = backends._loaded[backend].scaled

    def spy(transitions, sum_grads, grads, *rest):
        seen.extend(grad.shape for grad in grads)
        return scaled(transitions, sum_grads, grads, *rest)

    monkeypatch.setattr(backends._loaded[backend], "scaled", spy)
    for steps in (None, 3):
        given = problem("velocity", steps=steps, dtype=torch.float32, guided=True)
        v = given["model_output"].requires_grad_()
        uncond = given["model_output_uncond"].requires_grad_()
        given["advantages"] = given["advantages"].float()
        (0.25 * go.guard_loss(**given).loss).backward()
        want = go.guard_loss_and_grad(**given).grad
        assert torch.equal(v.grad, 0.25 * want[0])
        assert torch.equal(uncond.grad, 0.25 * want[1])
        assert seen == [(steps or 1, 4, 30)] * 2
        seen.clear()


def test_statistics_that_are_no_plain_tensors_go_through_python():
    given = problem("velocity", dtype=torch.float32)
    given["advantages"] = given["advantages"].float()
    log_ratio = torch.randn(3, 8)
    want = go.guard_loss(**given, statistics=go.RatioStatistics(3).update(log_ratio)).loss
    of_a_subclass = go.RatioStatistics(3).update(log_ratio.as_subclass(Subclass))
    assert torch.equal(go.guard_loss(**given, statistics=of_a_subclass).loss, want)


def test_nothing_is_left_to_run_backward_through():
    given = problem("velocity", dtype=torch.float32)
    table = given["coeffs"].table.clone().requires_grad_()
    given["coeffs"] = go.StepCoefficients._of(table, True, ())
    for advantages in (given["advantages"].float(), given["advantages"].bfloat16()):
        loss, grad = go.guard_loss_and_grad(**{**given, "advantages": advantages})
        assert not loss.requires_grad
        assert not grad.requires_grad


def test_inference_mode_is_refused_where_autograd_makes_the_gradient():
    given = problem("velocity", dtype=torch.float32)
    given["advantages"] = given["advantages"].float()
    with torch.inference_mode():
        assert torch.isfinite(go.guard_loss_and_grad(**given).grad).all()
        with go.use_backend("reference"), pytest.raises(RuntimeError, match="inference mode"):
            go.guard_loss_and_grad(**given)


@pytest.mark.parametrize("advantages", [torch.float32, torch.bfloat16])
def test_freed_storage_is_refused(advantages):
    given = problem("velocity", dtype=torch.float32)
    given["advantages"] = given["advantages"].to(advantages)
    given["sample"].untyped_storage().resize_(0)  # as FSDP frees parameters
    with pytest.raises(RuntimeError, match="storage"):
        go.guard_loss(**given)


def test_a_constant_that_changes_before_backward_is_noticed():
    given = problem("velocity", dtype=torch.float32)
    given["advantages"] = given["advantages"].float()
    given["model_output"] = given["model_output"].requires_grad_()
    assert plainly(given) is not None
    loss = go.guard_loss(**given).loss
    given["sample"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
