"""The gradient of an update is that of a plain step which holds the whole graph at once."""

import contextlib

import plain
import pytest
import torch
from tiny import Double, TinyPolicy, started, tiny_trainer
from torch.utils.checkpoint import checkpoint

import guard_ops as go
from guard_ops.trainer import Window

OBJECTIVES = {
    "article": (go.GuardConfig.article, {}),
    "paper": (go.GuardConfig.paper, {"window": Window("random_window", 2)}),
    "flow_grpo": (go.GuardConfig.flow_grpo, {"window": Window("subset", 2, outside="ode")}),
    "dance_grpo": (
        go.GuardConfig.dance_grpo,
        {"sde": "dance_sde", "noise_level": 0.3, "window": Window("subset_per_sample", 2)},
    ),
}


class Autocast(TinyPolicy):
    """float32 weights, bfloat16 velocities, activations computed again in the backward."""

    def velocity(self, latents, timestep, condition):
        def call(latents):
            with torch.autocast("cpu", torch.bfloat16):
                return super(Autocast, self).velocity(latents, timestep, condition)

        return checkpoint(call, latents, use_reentrant=False)


def gradients(trainer):
    return {name: p.grad.clone() for name, p in trainer.parameters.items()}


def updated(tmp_path, policy, objective, kl_beta, micro_batch, **changes):
    """Gradients of a second update: found, and expected of the plain step."""
    guard, settings = OBJECTIVES[objective]
    config = guard(kl_beta=kl_beta)
    trainer = tiny_trainer(
        tmp_path,
        policy=policy,
        guard=config,
        micro_batch=micro_batch,
        max_grad_norm=float("inf"),
        checkpoint_every=0,
        **settings,
        **changes,
    )
    loop, rollout, batches = started(trainer)
    advantages = torch.linspace(-1.5, 2.0, 16, dtype=torch.float64)[torch.randperm(16)]
    loop.update(rollout, advantages, batches[0], on_policy=True)
    expected = plain.gradients(loop, rollout, advantages, batches[1], config)
    *_, metrics = loop.update(rollout, advantages, batches[1], on_policy=False)
    assert (metrics.ratio_std > 0).all()
    return gradients(trainer), expected


@pytest.mark.parametrize("micro_batch", [1, 3, None])
@pytest.mark.parametrize("kl_beta", [0.0, 0.04])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_gradient_in_float64_is_the_plain_steps_at_any_micro_batch(
    tmp_path, objective, kl_beta, micro_batch
):
    found, expected = updated(tmp_path, Double(), objective, kl_beta, micro_batch, rollout_batch=3)
    assert plain.relative(found, expected) < 1e-9


@pytest.mark.parametrize("micro_batch", [1, 3, None])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_gradient_in_bfloat16_points_where_the_plain_steps_does(tmp_path, objective, micro_batch):
    found, expected = updated(tmp_path, Autocast(), objective, 0.0, micro_batch, learning_rate=0.1)
    assert plain.cosine(found, expected) > 0.99999


@pytest.mark.parametrize("policy", [TinyPolicy, Autocast, lambda: TinyPolicy().bfloat16()])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_first_update_sees_a_ratio_of_exactly_1(tmp_path, policy, objective, monkeypatch):
    guard, settings = OBJECTIVES[objective]
    trainer = tiny_trainer(
        tmp_path, policy=policy(), guard=guard(), micro_batch=3, rollout_batch=5,
        checkpoint_every=0, **settings,
    )  # fmt: skip
    loop, rollout, batches = started(trainer)
    seen, compute = [], go.guard_loss_and_grad
    monkeypatch.setattr(
        go, "guard_loss_and_grad", lambda *a, **k: seen.append(compute(*a, **k)) or seen[-1]
    )
    loop.update(rollout, torch.randn(16), batches[0], on_policy=True)
    assert not seen[0].log_ratio.any()
    assert not seen[0].excess.any()
    assert seen[0].grad.any()


def test_statistics_of_micro_batches_give_another_gradient(tmp_path):
    """What a loop over micro-batches of two samples would have: the reason for three movements."""
    guard, _ = OBJECTIVES["article"]
    trainer = tiny_trainer(tmp_path, policy=Double(), guard=guard(), checkpoint_every=0)
    loop, rollout, batches = started(trainer)
    advantages = torch.linspace(-1.5, 2.0, 16, dtype=torch.float64)
    loop.update(rollout, advantages, batches[0], on_policy=True)
    whole = plain.gradients(loop, rollout, advantages, batches[1], guard())
    parts = []
    for rows in batches[1].rows.split(2):
        part = batches[1]._replace(rows=rows)
        parts.append(plain.gradients(loop, rollout, advantages, part, guard()))
    summed = {name: sum(part[name] for part in parts) / len(parts) for name in whole}
    assert plain.cosine(summed, whole) < 0.99


def test_the_reference_is_the_policy_before_training(tmp_path):
    trainer = tiny_trainer(
        tmp_path, guard=go.GuardConfig.article(kl_beta=0.1), checkpoint_every=0, rollout_batch=16
    )
    _, rollout, _ = started(trainer)
    with torch.no_grad(), trainer.policy.reference():
        for k in range(3):
            expected = trainer.policy.base(rollout.latents[k].flatten(1)).reshape(-1, 2, 3)
            torch.testing.assert_close(rollout.reference[k], expected, rtol=1e-5, atol=1e-6)


with contextlib.suppress(ImportError):
    from diffusers import SD3Transformer2DModel


class TinySd3(torch.nn.Module):
    """SD3's transformer with random weights: autocast and gradient checkpointing."""

    latent_shape = (4, 8, 8)

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
            caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=8,
        )  # fmt: skip
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn(p.shape) * (0.2 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.05))
        self.transformer.enable_gradient_checkpointing()
        self.dtype = dtype

    def schedule(self, steps):
        from guard_ops.trainer import Schedule

        sigmas = torch.linspace(1, 0, steps + 1)
        return Schedule(tuple(sigmas.tolist()), 1000 * sigmas[:-1])

    def encode(self, prompts):
        numbers = torch.tensor([float(prompt) for prompt in prompts])
        text = torch.sin(numbers[:, None, None] + torch.arange(36.0).reshape(1, 3, 12))
        return {"text": text, "pooled": text.flatten(1)[:, :10]}

    def velocity(self, latents, timestep, condition):
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.transformer(
                latents,
                encoder_hidden_states=condition["text"],
                pooled_projections=condition["pooled"],
                timestep=timestep,
                return_dict=False,
            )[0]

    def decode(self, latents):
        return latents[:, :3]

    def reference(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    "dtype, micro_batch, least",
    [
        (torch.float32, 3, 0.9999999),
        (torch.bfloat16, 8, 0.99999),  # the plain step's own batch: a step of all samples
        (torch.bfloat16, 3, 0.99999),
    ],
)
def test_a_tiny_sd3_is_exact_on_policy_and_its_gradient_the_plain_steps(
    tmp_path, dtype, micro_batch, least
):
    pytest.importorskip("diffusers")
    trainer = tiny_trainer(
        tmp_path, policy=TinySd3(dtype), micro_batch=micro_batch, checkpoint_every=0, group_size=4,
        minibatches=1, max_grad_norm=float("inf"), learning_rate=1e-3,
    )  # fmt: skip
    loop, rollout, batches = started(trainer)
    advantages = torch.linspace(-1.5, 2.0, 8)
    config = go.GuardConfig.article()
    expected = plain.gradients(loop, rollout, advantages, batches[0], config)
    *_, metrics = loop.update(rollout, advantages, batches[0], on_policy=True)
    assert not metrics.ratio_std.any()
    assert not metrics.ratio_bias.any()
    assert plain.cosine(gradients(trainer), expected) > least
