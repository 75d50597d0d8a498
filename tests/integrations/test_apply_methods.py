"""``apply`` on methods: Flow-Factory's schedulers, UniRL's strategies and its loss."""

from __future__ import annotations

import pytest
import restated
import torch
from patched import fused
from restated import module

import guard_ops.integrations as integrations

pytest.importorskip("diffusers", reason="needs diffusers' schedulers")
pytestmark = pytest.mark.usefixtures("nothing_stays")


@pytest.fixture
def flow_factory_package(monkeypatch):
    euler, unipc, output = restated.flow_factory_schedulers()
    folder = "flow_factory.scheduler"
    monkeypatch.setattr(restated.SDESchedulerOutput, "__module__", folder)
    module(
        monkeypatch,
        f"{folder}.flow_match_euler_discrete",
        FlowMatchEulerDiscreteSDEScheduler=euler,
        SDESchedulerOutput=restated.SDESchedulerOutput,
    )
    module(
        monkeypatch,
        f"{folder}.unipc_multistep",
        UniPCMultistepSDEScheduler=unipc,
        UniPCMultistepSDESchedulerOutput=output,
    )
    return euler, unipc


def test_both_of_flow_factorys_schedulers_are_replaced(flow_factory_package):
    euler, unipc = flow_factory_package
    held = [euler.step, unipc.step]
    with integrations.apply("flow_factory") as patch:
        assert fused(euler.step)
        assert fused(unipc.step)
        assert len(patch.proofs) == 2
        assert max(proof.largest for proof in patch.proofs.values()) < 1e-5
    assert [euler.step, unipc.step] == held


def test_flow_factory_without_noise_outside_the_sdes_steps(flow_factory_package):
    theirs = flow_factory_package[0](shift=3.0)
    theirs.set_timesteps(8)
    x, v = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    with integrations.apply("flow_factory"):
        out = theirs.step(v, theirs.timesteps[1], x, return_kwargs=["next_latents", "std_dev_t"])
        late = theirs.step(v, theirs.timesteps[7], x, return_kwargs=["next_latents", "std_dev_t"])
    assert out.log_prob is None
    assert out.std_dev_t.min() > 0
    assert not late.std_dev_t.any()  # not one of the SDE's steps: the ODE's sample
    dt = theirs.sigmas[8] - theirs.sigmas[7]
    torch.testing.assert_close(late.next_latents, x + dt * v)


@pytest.fixture
def unirl_kernels(monkeypatch):
    return module(monkeypatch, "unirl.sde.kernels", **restated.unirl_strategies())


STRATEGIES = ("FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy")


def denoise(strategy):
    generator = torch.Generator().manual_seed(4)
    v, x, y = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    sigma = torch.tensor([0.9, 0.5])
    return strategy.denoise(v, x, sigma, sigma - 0.1, eta=0.7, prev_sample=y)[0]


def test_unirls_strategies_get_a_method_of_their_own_and_their_base_keeps_its(unirl_kernels):
    base = unirl_kernels.StepStrategy.denoise
    patch = integrations.apply("unirl")
    assert patch.replaced == tuple(f"unirl.sde.kernels.{name}.denoise" for name in STRATEGIES)
    assert all(proof.cases > 10 and proof.largest < 1e-5 for proof in patch.proofs.values())
    assert len(patch.proofs) == 3
    for name in STRATEGIES:
        strategy = getattr(unirl_kernels, name)
        assert fused(strategy.denoise)
        assert denoise(strategy()).isfinite().all()
    for name in ("StepStrategy", "DPM2Strategy"):
        assert getattr(unirl_kernels, name).denoise is base
    assert patch.left_alone[-1].startswith("unirl.sde.kernels.DPM2Strategy: a solver of the ODE")
    with integrations.apply("unirl") as again:
        assert again.replaced == patch.replaced
    assert patch.active
    patch.undo()
    for name in STRATEGIES:
        assert "denoise" not in vars(getattr(unirl_kernels, name))
        assert getattr(unirl_kernels, name).denoise is base


def test_a_strategy_of_somebodys_own_keeps_what_it_overrides(unirl_kernels):
    """What it inherits calls its ``step``, which ours does not know."""
    calls = []

    class Mine(unirl_kernels.FlowSDEStrategy):
        def step(self, *args):
            calls.append(args)
            return super().step(*args)

    with integrations.apply("unirl"):
        denoise(Mine())
        assert len(calls) == 1
        denoise(unirl_kernels.FlowSDEStrategy())
        assert len(calls) == 1


def test_another_strategy_under_unirls_name_is_refused(unirl_kernels, monkeypatch):
    monkeypatch.setattr(unirl_kernels.DanceSDEStrategy, "std", lambda self, *_: torch.tensor(0.4))
    with pytest.raises(ValueError, match=r"DanceSDEStrategy\.denoise is not what guard_ops"):
        integrations.apply("unirl")
    assert not fused(unirl_kernels.FlowSDEStrategy.denoise)


def test_unirls_flow_dppo_is_replaced_once_it_is_imported(unirl_kernels, monkeypatch):
    patch = integrations.apply("unirl")
    name = "unirl.algorithms.flowdppo._flowdppo_kl_adv_loss"
    assert f"{name}: this module is not imported" in patch.left_alone
    loss = restated.flowdppo_loss()
    late = module(monkeypatch, "unirl.algorithms.flowdppo", _flowdppo_kl_adv_loss=loss)
    assert patch.rescan().proofs[name].largest < 1e-5
    assert fused(late._flowdppo_kl_adv_loss)
    patch.undo()
    assert late._flowdppo_kl_adv_loss is loss
