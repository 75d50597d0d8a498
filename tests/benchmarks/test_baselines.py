"""The plain-PyTorch chains against what the public implementations returned, and the spec."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import baselines

DATA = Path(__file__).parents[1] / "data"


def load(name):
    archive = np.load(DATA / name)
    cases = {}
    for key in archive.files:
        case, rest = key.split("/", 1)
        cases.setdefault(case, {})[rest] = torch.from_numpy(np.asarray(archive[key]))
    return cases


PEERS = load("peers_f32.npz")
OBJECTIVE = load("objective_f64.npz")


def kind_of(case):
    return next(kind for kind in baselines.SDE_STEPS if case.startswith(kind))


def peer_step(case, model_output):
    data, kind = PEERS[case], kind_of(case)
    index = data["step"].expand(len(model_output))
    step = baselines.scheduler_step(
        data["sigmas"], index, data["noise_level"].item(), model_output.ndim - 1
    )
    return baselines.SDE_STEPS[kind](model_output, data["sample"], data["prev_sample"], step), step


# float32 against float32: what is left is the order of operations (tests/data/README.md).
@pytest.mark.parametrize("case", PEERS)
def test_step_returns_what_verl_omni_returns(case):
    data = PEERS[case]
    for v, log_prob, mean in (
        ("model_output", "log_prob", "prev_sample_mean"),
        ("old_model_output", "old_log_prob", "old_prev_sample_mean"),
    ):
        output, step = peer_step(case, data[v])
        torch.testing.assert_close(output.log_prob, data[log_prob], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(output.prev_sample_mean, data[mean], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(output.std_dev_t, data["std_dev_t"], rtol=1e-6, atol=0)
        torch.testing.assert_close(output.sqrt_dt.flatten(), data["sqrt_dt"], rtol=1e-6, atol=0)
        stored = baselines.stored_log_prob(data["prev_sample"], data[mean], step, kind_of(case))
        torch.testing.assert_close(stored, data[log_prob], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in PEERS if "flow_grpo_step/log_prob" in PEERS[c]])
def test_step_returns_what_flow_grpo_returns(case):
    data = PEERS[case]
    output, _ = peer_step(case, data["model_output"])
    for name in ("log_prob", "prev_sample_mean", "std_dev_t"):
        expected = data[f"flow_grpo_step/{name}"]
        torch.testing.assert_close(getattr(output, name), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in PEERS if "dance_grpo_step/log_prob" in PEERS[c]])
def test_step_returns_what_dance_grpo_returns(case):
    data = PEERS[case]
    output, _ = peer_step(case, data["model_output"])
    expected = data["dance_grpo_step/log_prob"]
    torch.testing.assert_close(output.log_prob, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", PEERS)
def test_losses_and_gradients_are_verl_omnis(case):
    losses = [name.removesuffix("/loss") for name in PEERS[case] if name.endswith("/loss")]
    assert losses
    for variant in losses:
        check_loss_and_gradient(case, variant)


def check_loss_and_gradient(case, variant):
    data = PEERS[case]
    name, clip, adv_clip = variant.rsplit("_", 2)
    clip, adv_clip = float(clip.removeprefix("clip")), float(adv_clip.removeprefix("adv"))
    v = data["model_output"].clone().requires_grad_()
    output, _ = peer_step(case, v)
    arguments = (data["advantages"], clip, adv_clip)
    if name == "grpo_guard":
        loss = baselines.grpo_guard_loss(
            output, data["old_log_prob"], data["old_prev_sample_mean"], *arguments
        )
    else:
        loss = baselines.flow_grpo_loss(output.log_prob, data["old_log_prob"], *arguments)
    loss.backward()
    torch.testing.assert_close(
        loss, data[f"{variant}/loss"], rtol=1e-5, atol=1e-6, msg=lambda text: f"{variant}: {text}"
    )
    expected = data[f"{variant}/grad"]
    assert (v.grad - expected).norm() <= 1e-4 * expected.norm(), variant


def test_dance_grpo_divides_by_the_accumulated_steps():
    log_prob, old, advantages = torch.randn(3, 6).unbind()
    whole = baselines.flow_grpo_loss(log_prob, old, advantages, 1e-4, 5.0)
    assert baselines.dance_grpo_loss(log_prob, old, advantages, 1e-4, 5.0, 8) == whole / 8


CHAINS = {
    "plain": baselines.flow_grpo_chain,
    "article": baselines.article_chain,
    "paper": baselines.paper_chain,
}


# Float64 log-probs of about 1 are subtracted to get log-ratios down to 1e-7: 1e-9 of them is noise,
# and a standard deviation divides by as little again.
@pytest.mark.parametrize("case", OBJECTIVE)
def test_chains_are_the_specification_in_float64(case):
    variants = [variant for variant in CHAINS if f"{variant}/loss" in OBJECTIVE[case]]
    assert variants
    for variant in variants:
        check_chain(case, variant)


def check_chain(case, variant):
    data, kind = OBJECTIVE[case], kind_of(case)
    v = data["model_output"].clone().requires_grad_()
    index = data["steps"].repeat_interleave(v.shape[1])
    step = baselines.scheduler_step(data["sigmas"], index, data["eta"].item(), v.ndim - 2)
    flat = {name: data[name].flatten(0, 1) for name in ("sample", "prev_sample")}
    old = baselines.SDE_STEPS[kind](data["old_model_output"].flatten(0, 1), **flat, step=step)
    operands = {name: data[name] for name in ("sample", "prev_sample", "advantages")}
    if variant == "paper":
        operands["old_mean"] = old.prev_sample_mean.view_as(v)
    loss = CHAINS[variant](
        v, old_log_prob=old.log_prob.view(v.shape[:2]), step=step, kind=kind, **operands
    )
    loss.backward()
    expected, gradient = data[f"{variant}/loss"], data[f"{variant}/grad"]
    torch.testing.assert_close(
        loss.detach(), expected, rtol=1e-8, atol=1e-8, msg=lambda text: f"{variant}: {text}"
    )
    assert (v.grad - gradient).norm() <= 1e-8 * gradient.norm(), variant


@pytest.mark.parametrize("variant", ["article", "paper"])
def test_bfloat16_is_upcast_like_the_public_implementations(variant):
    case = "flow_sde_4x6x6_K3_B5_drift0.3"
    data = OBJECTIVE[case]
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        latents = {
            name: data[name].bfloat16().to(dtype)
            for name in ("model_output", "sample", "prev_sample")
        }
        v = latents.pop("model_output").requires_grad_()
        index = data["steps"].repeat_interleave(v.shape[1])
        step = baselines.scheduler_step(data["sigmas"].float(), index, data["eta"].item(), 3)
        old = torch.zeros(v.shape[:2])
        extra = {"old_mean": data["sample"].float()} if variant == "paper" else {}
        loss = CHAINS[variant](
            v,
            **latents,
            old_log_prob=old,
            advantages=data["advantages"].float(),
            step=step,
            **extra,
        )
        loss.backward()
        assert v.grad.dtype == dtype
        losses.append(loss.detach())
    assert losses[0] == losses[1]
