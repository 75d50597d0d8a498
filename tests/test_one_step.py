"""A call of one step, and the K-step call that a loop over steps and micro-batches goes through."""

import pytest
import torch
from problems import problem, relative, run

import guard_ops as go

REFUSAL = (
    r"`config\.balance` is inverse_ratio.*it needs all K steps.*step_weights.*balance=\"none\""
)


@pytest.mark.parametrize("steps", [None, 1])
def test_one_step_with_the_article_s_balance_is_refused(steps, backend):
    given = problem("velocity", steps=steps)
    for function in (go.guard_loss, go.guard_loss_and_grad):
        for config in (
            None,
            go.GuardConfig.article(),
            go.GuardConfig.flow_grpo(balance="inverse_ratio"),
        ):
            with pytest.raises(ValueError, match=REFUSAL):
                function(**given, config=config)


@pytest.mark.parametrize("steps", [None, 1])
def test_with_weights_or_another_balance_it_is_not(steps, backend):
    given = problem("velocity", steps=steps)
    weights = torch.full((4,) if steps is None else (1, 4), 0.25, dtype=torch.float64)
    out = go.guard_loss(**given, step_weights=weights)
    assert torch.equal(out.weights, weights)
    for config in (go.GuardConfig(), go.GuardConfig.paper(), go.GuardConfig.flow_grpo()):
        assert go.guard_loss(**given, config=config).loss.isfinite()


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("name", ["article", "paper"])
def test_the_gradient_pushed_by_micro_batches_is_that_of_the_whole(name, micro, backend):
    """What README and docs/api.md show: no more activations than those of one micro-batch."""
    torch.manual_seed(0)
    config = getattr(go.GuardConfig, name)()
    given = problem("velocity", latent=(6,), drift=0.5)
    network = torch.nn.Linear(6, 6, dtype=torch.float64)
    inputs = given["model_output"]
    go.guard_loss(**{**given, "model_output": network(inputs)}, config=config).loss.backward()
    expected = network.weight.grad.clone()
    network.weight.grad = None
    with torch.no_grad():
        v = network(inputs)
    out = go.guard_loss_and_grad(**{**given, "model_output": v}, config=config)
    for k in range(3):
        for first in range(0, 4, micro):
            rows = slice(first, first + micro)
            network(inputs[k, rows]).backward(out.grad[k, rows])
    assert relative(network.weight.grad, expected) < 1e-12


def test_what_a_loop_over_steps_would_have_trained(backend):
    """The weights are most of the gradient's size at each step, which is why this is refused."""
    given = problem("velocity", drift=0.5)
    config = go.GuardConfig.article()
    _, whole = run(given, config)
    _, alone = run(given, go.GuardConfig())
    assert relative(alone, whole) > 0.2
