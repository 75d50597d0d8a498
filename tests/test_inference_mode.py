"""Rollouts run in inference mode: what they make is taken, and what is made there outlives it."""

import io

import pytest
import torch
from problems import FORMS, problem, schedule, without_advantages

import guard_ops as go
from guard_ops.schedule import coefficient_table

CONFIGS = {
    "article": go.GuardConfig.article(),
    "paper": go.GuardConfig.paper(),
    "through": go.GuardConfig.article(detach_stats=False),
}


def inferred(given):
    """The same operands as a rollout in inference mode leaves them."""
    with torch.inference_mode():
        return {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in given.items()
        }


def gradients(given, leaves, config):
    out = go.guard_loss(**{**given, **leaves}, config=config)
    out.loss.backward()
    return out, [leaf.grad for leaf in leaves.values()]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_operands_of_any_mode_are_constants(form, config, backend):
    if form == "log-prob" and config == "paper":
        pytest.skip("the paper's norm needs the old mean")
    given = problem(form, dtype=torch.float32, guided=True, reference=True)
    config = CONFIGS[config]
    config = type(config)(**{**config.__dict__, "kl_beta": 0.04})
    results = []
    for operands in (given, inferred(given)):
        leaves = {
            name: given[name].clone().requires_grad_()
            for name in ("model_output", "model_output_uncond")
        }
        results.append(gradients(operands, leaves, config))
    (one, grads), (other, others) = results
    assert torch.equal(one.loss, other.loss)
    for a, b in zip(grads, others, strict=True):
        assert torch.equal(a, b)


def test_rows_and_statistics_of_any_mode(backend):
    given = problem("velocity", dtype=torch.float64)
    weights = torch.rand(3, 4, dtype=torch.float64)
    log_ratio = go.log_ratio(**without_advantages(given)).log_ratio
    with torch.inference_mode():
        statistics = go.RatioStatistics(3).update(log_ratio)
        rows = {"advantages": given["advantages"].clone(), "step_weights": weights.clone()}
    grads = []
    for more in ({"step_weights": weights, "statistics": go.RatioStatistics(3).update(log_ratio)},
                 {**rows, "statistics": statistics}):  # fmt: skip
        leaf = {"model_output": given["model_output"].clone().requires_grad_()}
        grads += gradients({**given, **more}, leaf, CONFIGS["article"])[1]
    assert torch.equal(*grads)
    statistics.update(log_ratio)  # in place, now outside of inference mode
    statistics.load_state_dict(torch.inference_mode()(statistics.state_dict)())


@pytest.mark.parametrize("guided", [False, True])
def test_loss_and_grad_in_inference_mode(guided, backend):
    given = problem("mean", dtype=torch.float32, guided=guided)
    expected = go.guard_loss_and_grad(**given)
    with torch.inference_mode():
        inside = go.guard_loss_and_grad(**given)
    outside = go.guard_loss_and_grad(**inferred(given))
    for got in (inside, outside):
        assert torch.equal(got.loss, expected.loss)
        pairs = zip(got.grad, expected.grad, strict=True) if guided else [(got.grad, expected.grad)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_blocks_and_log_ratio_take_them(backend):
    given = inferred(problem("velocity", dtype=torch.float64))
    given["model_output"] = given["model_output"].clone().requires_grad_()
    t = go.log_ratio(**without_advantages(given))
    excess = go.ratio_norm(
        t.log_ratio, kl_old=t.kl_old, coeffs=given["coeffs"], config=CONFIGS["paper"]
    )
    go.clipped_surrogate(excess, given["advantages"], config=CONFIGS["paper"]).sum().backward()
    assert given["model_output"].grad.isfinite().all()


def test_what_is_made_there_outlives_it():
    line = torch.linspace(1, 0, 6)
    with torch.inference_mode():
        sigmas = torch.linspace(1, 0, 6)
        made = go.SdeSchedule(sigmas)
        tables = [
            made[1].table,
            made[1:3].table,
            made[[0, 2]].table,
            made[torch.tensor([[0, 1], [1, 0]])].table,
            made.to("cpu")[0].table,
            made[0].to("cpu").table,
            go.StepCoefficients(*(made[1].table.clone())).table,
            coefficient_table(
                line[:1].double(), line[1:2].double(), line.new_ones(()).double(), "flow_sde",
                line[1].double(),
            ),
            go.philox_seed(1, (2, 3)),
            go.RatioStatistics(2).mean,
        ]  # fmt: skip
    assert made.sigmas == go.SdeSchedule(line).sigmas
    for table in tables:
        assert not table.is_inference()
        assert not table.requires_grad


def test_a_changed_operand_is_noticed_where_torch_counts_changes(backend):
    given = problem("velocity", dtype=torch.float32)
    v = given["model_output"].clone().requires_grad_()
    loss = go.guard_loss(**{**given, "model_output": v}).loss
    given["sample"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_rollout_there_and_an_update_here(backend):
    steps = schedule()
    v = torch.randn(3, 2, 5)
    with torch.inference_mode():
        x = [torch.randn(2, 5)]
        seeds = go.philox_seed(3, (3, 2))
        for k in range(3):
            x.append(go.sde_step(v[k], x[k], steps[k], seed=seeds[k]).prev_sample)
        old, trajectory = v.clone(), torch.stack(x)
        advantages = go.group_advantages(torch.tensor([0.0, 1.0]))
    buffer = io.BytesIO()
    torch.save(trajectory, buffer)
    new = (v + 0.1 * torch.randn_like(v)).requires_grad_()
    go.guard_loss(
        new,
        advantages=advantages,
        coeffs=steps[:3],
        sample=trajectory[:-1],
        prev_sample=trajectory[1:],
        old_model_output=old,
    ).loss.backward()
    assert new.grad.isfinite().all()
