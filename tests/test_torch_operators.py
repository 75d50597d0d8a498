"""The registered operators under torch's own checks, and torch.compile over the public ops."""

import itertools

import pytest
import torch
from combinations import values_first
from problems import FORMS, operands, problem, relative, step_operands, without_advantages
from torch.utils._pytree import tree_leaves

import guard_ops as go
from guard_ops import config as configs
from guard_ops import transitions

pytestmark = pytest.mark.skipif(
    "cpu" not in go.available_backends(), reason="needs the compiled extension"
)


def problem_of(form, *, guided=False, dtype=torch.float32):
    return problem(form, latent=(9, 4), dtype=dtype, guided=guided, reference=True)


@pytest.mark.parametrize("form, guided", values_first(itertools.product(FORMS, [False, True])))
def test_opcheck_sums_and_gradient(form, guided):
    t = operands(problem_of(form, guided=guided))
    torch.library.opcheck(torch.ops.guard_ops.sums.default, t)
    c = torch.randn(3, 3, 4, dtype=torch.float64)
    for cond in (True, False):
        arguments = (c, *t, cond, guided)
        torch.library.opcheck(torch.ops.guard_ops.gradient.default, arguments)


@pytest.mark.parametrize(
    "form, dtype", values_first(itertools.product(FORMS, [torch.float64, torch.bfloat16]))
)
def test_opcheck_guard_loss_and_its_parts(form, dtype):
    guided = dtype == torch.bfloat16
    t = operands(problem_of(form, guided=guided, dtype=dtype))
    advantages = torch.randn(3, 4, dtype=torch.float64)
    old = torch.randn(3, 4, dtype=torch.float64) if form == "log-prob" else None
    weights, statistics = torch.full((3, 4), 0.3, dtype=torch.float64), torch.ones(3, 3).double()
    choices, numbers = configs.objective_of(go.GuardConfig(kl_beta=0.01), True)
    # opcheck compares outputs as if NaN were an error, and the log-prob form's kl_old is NaN.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if form != "log-prob":
        checks = (*checks, "test_aot_dispatch_dynamic")
    for more in ((old, None, None, None), (old, weights, torch.full_like(weights, 9), statistics)):
        arguments = (*t, [advantages, *more], list(choices), list(numbers), True, guided)
        operator = torch.ops.guard_ops.guard_loss.default
        torch.library.opcheck(operator, arguments, test_utils=checks)
        arguments = (torch.ops.guard_ops.sums(*t), *arguments[:-2])
        for operator in ("evaluate", "ratio_statistics"):
            operator = getattr(torch.ops.guard_ops, operator).default
            torch.library.opcheck(operator, arguments, test_utils=checks[:3])


@pytest.mark.parametrize(
    "source, dtype, guided",
    values_first(
        itertools.product(["noise", "seed"], [torch.float64, torch.float16], [False, True])
    ),
)
def test_opcheck_sde_step(source, dtype, guided):
    t = step_operands(source, latent=(9, 4), dtype=dtype, guided=guided)
    torch.library.opcheck(torch.ops.guard_ops.sde_step.default, t)


def test_the_operator_of_a_step_refuses_what_is_not_a_steps():
    latents, *rest = step_operands("noise", latent=(9, 4), dtype=torch.float32)
    more = transitions.Latents._make(latents)._replace(prev_sample=latents[0])
    with pytest.raises(RuntimeError, match="sde_step needs sample and no operand of the behaviour"):
        torch.ops.guard_ops.sde_step(list(more), *rest)
    seed = go.philox_seed(1, (3, 4))
    with pytest.raises(RuntimeError, match="sde_step needs noise or seed"):
        torch.ops.guard_ops.sde_step(latents, seed, *rest[1:])


@pytest.mark.parametrize(
    "factor, dtype",
    values_first(itertools.product([1.0, 0.25], [torch.float64, torch.float32, torch.bfloat16])),
)
def test_opcheck_scaled(factor, dtype):
    t = operands(problem_of("velocity", guided=True, dtype=dtype))
    c = torch.randn(3, 3, 4, dtype=torch.float64)
    grads = torch.ops.guard_ops.gradient(c, *t, True, True)
    arguments = (*grads, torch.tensor(factor), c, *t, True, True)
    torch.library.opcheck(torch.ops.guard_ops.scaled_.default, arguments)


def test_operators_are_given_lists_and_no_named_tuples(monkeypatch):
    """torch.compile of torch 2.9 takes no others; the tests below would see it only there."""
    given = []

    class Operators:
        def guard_loss(self, *arguments):
            given.extend(arguments)
            return torch.ops.guard_ops.guard_loss(*arguments)

    compiled = pytest.importorskip("guard_ops.backends.compiled")
    with go.use_backend("cpu"):
        call = problem("velocity", latent=(9, 4))
        monkeypatch.setattr(compiled, "_ops", Operators())
        go.guard_loss(**call, config=go.GuardConfig())
    assert [type(x) for x in given[:5]] == [list, type(None), torch.Tensor, float, list]


def test_every_registered_operator_is_checked_above():
    names = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("guard_ops::")
    }
    of_a_loss = {"sums", "evaluate", "ratio_statistics", "gradient", "guard_loss", "scaled_"}
    assert names == of_a_loss | {"sde_step"}


def compiled_and_eager(given, config, compiler, dynamic=None):
    """(loss, excess, gradient) of guard_loss, traced whole and not."""

    def step(v, rest):
        out = go.guard_loss(v, **rest, config=config)
        return out.loss, out.excess, out.metrics.clip_fraction

    results = []
    rest = {name: value for name, value in given.items() if name != "model_output"}
    torch.compiler.reset()
    traced = torch.compile(step, fullgraph=True, backend=compiler, dynamic=dynamic)
    for function in (traced, step):
        v = given["model_output"].detach().clone().requires_grad_()
        loss, *others = function(v, rest)
        (2.0 * loss).backward()
        results.append((loss.detach(), *others, v.grad))
    return results


# The compiled graph holds the same operators; only the multiplication by grad_output is its own.
# To trace a call takes seconds.
rarely = pytest.mark.slow_suite


@pytest.mark.parametrize(
    "form, config, dtype",
    [
        ("mean", go.GuardConfig.article(), torch.float32),
        pytest.param(
            "velocity", go.GuardConfig.flow_grpo(clip_low=0.2), torch.float64, marks=rarely
        ),
        pytest.param(
            "noise", go.GuardConfig.paper(clip_low=0.2, clip_high=0.2), torch.bfloat16, marks=rarely
        ),
        ("seeded", go.GuardConfig.article(detach_stats=False), torch.float16),
        pytest.param(
            "log-prob",
            go.GuardConfig("standardize", balance="inverse_dt"),
            torch.float32,
            marks=rarely,
        ),
    ],
)
def test_guard_loss_compiles_into_one_graph(form, config, dtype, backend):
    given = problem(form, latent=(9, 4), dtype=dtype)
    if form == "seeded":
        given |= {"mask": torch.arange(36).reshape(9, 4) % 5 != 0, "latent_offset": 8}
    compiled, eager = compiled_and_eager(given, config, "aot_eager")
    for got, expected in zip(compiled, eager, strict=True):
        assert got.dtype == expected.dtype
        assert relative(got, expected) < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("kl_beta", [pytest.param(0.0, marks=rarely), 0.1])
def test_guard_loss_compiles_with_symbolic_numbers(kl_beta, fused_backend):
    given = problem("mean", latent=(9, 4), dtype=torch.float32, reference=kl_beta > 0)
    config = go.GuardConfig.article(kl_beta=kl_beta)
    compiled, eager = compiled_and_eager(given, config, "aot_eager", dynamic=True)
    for got, expected in zip(compiled, eager, strict=True):
        assert relative(got, expected) < 1e-6


@pytest.mark.parametrize(
    "traced",
    [
        *(getattr(transitions, name) for name in ("CallShape", "Latents", "Transitions", "Rows")),
        configs.Objective,
    ],
)
def test_no_named_tuple_that_is_traced_has_a_property(traced):
    """torch.compile of 2.9 compares it as an object, and takes a branch by that."""
    assert not [name for name, x in vars(traced).items() if isinstance(x, property)]


def test_guard_loss_and_grad_compiles_into_one_graph(fused_backend):
    given = problem("mean", latent=(9, 4), dtype=torch.bfloat16)
    v, coeffs = given.pop("model_output"), given.pop("coeffs")

    def step(v, rest):
        return go.guard_loss_and_grad(v, coeffs=coeffs, **rest)

    torch.compiler.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(v, given)
    expected = step(v, given)
    for compiled, eager in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert torch.equal(compiled, eager)


@pytest.mark.slow_suite
def test_guard_loss_compiles_with_inductor(fused_backend):
    given = problem("noise", latent=(9, 4), dtype=torch.float32, guided=True)
    compiled, eager = compiled_and_eager(given, go.GuardConfig.article(), "inductor")
    for got, expected in zip(compiled, eager, strict=True):
        assert relative(got, expected) < 1e-6


def test_a_custom_objective_over_log_ratio_compiles(backend):
    given = without_advantages(problem("velocity", latent=(9, 4), dtype=torch.float32))
    v = given.pop("model_output").requires_grad_()

    def objective(v):
        t = go.log_ratio(v, **given)
        return (t.log_ratio.exp() * t.kl_old.detach()).sum() + t.kl_old.sum()

    torch.compiler.reset()
    loss = torch.compile(objective, fullgraph=True, backend="aot_eager")(v)
    (grad,) = torch.autograd.grad(loss, v)
    expected = objective(v)
    (expected_grad,) = torch.autograd.grad(expected, v)
    assert relative(loss, expected) < 1e-6
    assert relative(grad, expected_grad) < 1e-6


@pytest.mark.parametrize("guided", [False, True])
def test_sde_step_compiles(guided, backend):
    given = problem("velocity", latent=(9, 4), dtype=torch.float32, guided=guided)
    scale = given.get("guidance_scale")
    seeds, noise = go.philox_seed(5, (3, 4)), torch.randn(3, 4, 9, 4)
    source = {"noise": noise} if guided else {"seed": seeds}

    def step(v, x, uncond):
        guidance = {"model_output_uncond": uncond, "guidance_scale": scale}
        return tuple(go.sde_step(v, x, given["coeffs"], **source, **guidance)[:3])

    arguments = (given["model_output"], given["sample"], given.get("model_output_uncond"))
    torch.compiler.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    for left, right in zip(got, step(*arguments), strict=True):
        assert relative(left, right) < 1e-6
