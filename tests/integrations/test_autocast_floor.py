"""Where a transformer under autocast rounds, and what std_floor="auto" makes of it."""

import math

import pytest
import torch

import guard_ops as go

diffusers = pytest.importorskip("diffusers")
BATCH, NUMEL = 8, 16 * 16 * 16
SCHEDULE = go.SdeSchedule(torch.linspace(1, 0, 11))


@pytest.fixture(scope="module")
def velocities():
    """The same velocities computed in one batch and sample by sample, in bfloat16."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        out_channels=16,
        pos_embed_max_size=16,
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))
    latents, embeds = torch.randn(BATCH, 16, 16, 16), torch.randn(BATCH, 7, 32)
    pooled, timestep = torch.randn(BATCH, 32), torch.full((BATCH,), 500.0)

    def velocity(rows):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(
                hidden_states=latents[rows],
                encoder_hidden_states=embeds[rows],
                pooled_projections=pooled[rows],
                timestep=timestep[rows],
            ).sample

    return torch.cat([velocity([n]) for n in range(BATCH)]), velocity(list(range(BATCH)))


def loss(new, old, k):
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(k))
    return go.guard_loss(
        new,
        advantages=torch.linspace(-1, 1, BATCH),
        coeffs=SCHEDULE[k],
        config=go.GuardConfig(),
        old_model_output=old,
        noise=noise,
    )


@pytest.mark.parametrize("k", [0, 3, 8])
def test_its_rounding_is_of_the_formula_s_size_and_does_not_count_as_a_ratio(velocities, k):
    new, old = velocities
    assert new.dtype == torch.bfloat16
    assert not torch.equal(new, old), "this processor rounds alike in both batch sizes"
    out, coeffs = loss(new, old, k), SCHEDULE[k]
    size = old.double().square().mean().sqrt()
    formula = 2**-7 / 4 * size * coeffs.b.abs() / (coeffs.s * math.sqrt(NUMEL))
    assert 0.3 < out.metrics.ratio_std / formula < 2.5
    assert out.metrics.degenerate == 1
    assert out.metrics.clip_fraction == 0


def test_a_dtype_that_hides_the_rounding_is_undone_by_a_cast(velocities):
    new, old = velocities
    hidden = loss(new.float(), old.float(), 3)
    assert hidden.metrics.degenerate == 0  # so it was divided by its rounding's spread
    assert hidden.metrics.clip_fraction > 0
    cast = loss(new.float().to(torch.bfloat16), old.float(), 3)
    assert torch.equal(cast.excess, loss(new, old, 3).excess)
    assert cast.metrics.degenerate == 1
