"""The registered operators under torch's own checks, and torch.compile over the public ops."""

import os

import pytest
import torch
from problems import FORMS, operands, problem, run, step_operands

import guard_ops as go
from guard_ops.config import objective_of
from guard_ops.transitions import Rows

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or "triton" not in go.available_backends(),
    reason="interprets; tests/device run on a GPU",
)


@pytest.mark.parametrize("form, guided", [(form, form == "velocity") for form in FORMS])
def test_opcheck(form, guided):
    ops = torch.ops.guard_ops_triton
    t = operands(problem(form, steps=2, batch=2, latent=(9, 4), dtype=torch.float32, guided=guided))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.sums.default, t, test_utils=checks)
    c = torch.randn(3, 2, 2, dtype=torch.float64)
    torch.library.opcheck(ops.gradient.default, (c, *t, True, guided), test_utils=checks)
    advantages = torch.randn(2, 2, dtype=torch.float64)
    old = torch.randn(2, 2, dtype=torch.float64) if form == "log-prob" else None
    objective = map(list, objective_of(go.GuardConfig.article(), True))
    arguments = (*t, [*Rows(advantages, old, None, None, None)], *objective)
    torch.library.opcheck(ops.guard_loss.default, (*arguments, True, guided), test_utils=checks)
    for operator in (ops.evaluate.default, ops.ratio_statistics.default):
        torch.library.opcheck(operator, (ops.sums(*t), *arguments), test_utils=checks)


@pytest.mark.parametrize("source, guided", [("noise", True), ("seed", False)])
def test_opcheck_sde_step(source, guided):
    t = step_operands(source, steps=2, batch=2, latent=(30,), dtype=torch.float32, guided=guided)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.guard_ops_triton.sde_step.default
    torch.library.opcheck(operator, t, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_traces_without_a_graph_break(dtype):
    given = problem("noise", steps=2, batch=2, dtype=dtype, drift=0.3)
    rest = {name: x for name, x in given.items() if name not in ("model_output", "coeffs")}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(v, **rest):
        return go.guard_loss(v, coeffs=given["coeffs"], **rest).loss

    with go.use_backend("triton"):
        expected, grad = run(given)
        v = given["model_output"].detach().requires_grad_()
        value = loss(v, **rest)
        value.backward()
    assert torch.equal(value, expected.loss)
    assert torch.equal(v.grad, grad)
