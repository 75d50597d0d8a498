"""``apply`` on verl-omni: its scheduler's step, its registry of losses and its config."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass

import pytest
import restated
import torch
from patched import fused
from restated import module

import guard_ops.integrations as integrations
from guard_ops.integrations import verl_omni

pytest.importorskip("diffusers", reason="needs diffusers' schedulers")
pytestmark = pytest.mark.usefixtures("nothing_stays")


@pytest.fixture
def verl_package(monkeypatch):
    """verl-omni's scheduler and its loss registry, restated."""
    registry = {}

    class DiffusionLossFn:
        def validate_inputs(self, *, loss_name, model_output, data):
            missing = [k for k in self.required_data_keys if k not in data]
            if missing:
                raise KeyError(f"{loss_name}: {missing}")

    def register_diffusion_loss(name):
        def decorator(cls):
            registry[name] = cls()
            return cls

        return decorator

    @dataclass
    class DiffusionLossResult:
        loss: torch.Tensor
        metrics: dict
        add_loss_metric: bool = False

    scheduler = module(
        monkeypatch,
        "verl_omni.pipelines.schedulers.flow_match_sde",
        FlowMatchSDEDiscreteScheduler=restated.verl_scheduler(),
    )
    module(
        monkeypatch,
        "verl_omni.trainer.diffusion.diffusion_algos",
        DIFFUSION_LOSS_REGISTRY=registry,
        DiffusionLossFn=DiffusionLossFn,
        DiffusionLossResult=DiffusionLossResult,
        register_diffusion_loss=register_diffusion_loss,
    )
    return scheduler.FlowMatchSDEDiscreteScheduler, registry


def test_verl_omni_gets_the_step_and_two_losses(verl_package):
    scheduler, registry = verl_package
    held = [scheduler.sample_previous_step]
    with integrations.apply("verl_omni"):
        assert fused(scheduler.sample_previous_step)
        assert sorted(registry) == ["flow_grpo_fused", "grpo_guard_fused"]
        with integrations.apply("verl_omni"):
            pass
        assert sorted(registry) == ["flow_grpo_fused", "grpo_guard_fused"]
    assert scheduler.sample_previous_step is held[0]
    assert not registry


@pytest.fixture
def verl_config(monkeypatch):
    """verl-omni's loss config: it refuses assignments, and its names are a local list."""

    class BaseConfig:
        def __setattr__(self, name, value):
            if name in self.__dict__:
                raise AttributeError(f"Field {name!r} is frozen and cannot be modified")
            super().__setattr__(name, value)

    @dataclass
    class DiffusionLossConfig(BaseConfig):
        loss_mode: str = "flow_grpo"
        adv_clip_max: float = 5.0

        def __post_init__(self):
            valid_modes = ["flow_grpo", "flow_dppo", "grpo_guard"]
            if self.loss_mode not in valid_modes:
                raise ValueError(f"Invalid diffusion loss_mode: {self.loss_mode}")
            if self.adv_clip_max <= 0:
                raise ValueError("adv_clip_max must be positive")

    module(
        monkeypatch,
        "verl_omni.workers.config.diffusion.actor",
        DiffusionLossConfig=DiffusionLossConfig,
    )
    return DiffusionLossConfig


def test_verl_omnis_config_takes_the_fused_names(verl_package, verl_config):
    original = verl_config.__post_init__
    for name in verl_omni.LOSSES:
        with pytest.raises(ValueError, match="Invalid diffusion loss_mode"):
            verl_config(loss_mode=name)
    with integrations.apply("verl_omni"):
        verl_omni.register()
        for name in verl_omni.LOSSES:
            assert verl_config(loss_mode=name).loss_mode == name
            with pytest.raises(ValueError, match="adv_clip_max must be positive"):
                verl_config(loss_mode=name, adv_clip_max=0.0)
        assert verl_config().loss_mode == "flow_grpo"
        with pytest.raises(ValueError, match="Invalid diffusion loss_mode: other"):
            verl_config(loss_mode="other")
    assert verl_config.__post_init__ is original
    with pytest.raises(ValueError, match="Invalid diffusion loss_mode"):
        verl_config(loss_mode="flow_grpo_fused")


def test_another_class_with_that_method_is_named(verl_package, monkeypatch):
    class Sub(verl_package[0]):
        def sample_previous_step(self):
            return "its own"

    name = "verl_omni.pipelines.schedulers.another"
    Sub.__module__, Sub.__qualname__ = name, "Sub"
    module(monkeypatch, name, Sub=Sub)
    with integrations.apply("verl_omni") as patch:
        assert f"{name}.Sub.sample_previous_step: a method that guard_ops does not know" in (
            patch.left_alone
        )


def test_nothing_stays_replaced_when_the_registry_cannot_be_imported(verl_package, monkeypatch):
    scheduler, _ = verl_package
    held = [scheduler.sample_previous_step]
    name = "verl_omni.trainer.diffusion"
    monkeypatch.setitem(sys.modules, f"{name}.diffusion_algos", None)
    monkeypatch.delattr(sys.modules[name], "diffusion_algos")
    with pytest.raises(ImportError):
        integrations.apply("verl_omni")
    assert scheduler.sample_previous_step is held[0]


def test_verl_omni_losses_run_through_its_registry(verl_package):
    _, registry = verl_package
    config = types.SimpleNamespace(
        diffusion_loss=types.SimpleNamespace(clip_ratio=0.2, adv_clip_max=5.0)
    )
    old = torch.tensor([-1.0, -1.1, -0.9])
    log_prob = (old + torch.tensor([0.01, -0.02, 0.5])).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 2.0])
    mean = torch.zeros(3, 4, requires_grad=True)
    data = {"old_log_probs": old, "advantages": advantages, "old_prev_sample_mean": mean + 0.1}
    output = {"log_probs": log_prob, "prev_sample_mean": mean * 1.0,
              "std_dev_t": torch.full((3, 1), 0.5), "sqrt_dt": torch.full((3,), 0.3)}  # fmt: skip
    with integrations.apply("verl_omni"):
        for name in ("flow_grpo_fused", "grpo_guard_fused"):
            loss_fn = registry[name]
            loss_fn.validate_inputs(loss_name=name, model_output=output, data=data)
            result = loss_fn(config=config, model_output=output, data=data)
            (grad,) = torch.autograd.grad(result.loss, log_prob, retain_graph=True)
            assert result.loss.isfinite()
            assert grad.abs().sum() > 0
        with pytest.raises(KeyError):
            loss_fn.validate_inputs(loss_name=name, model_output=output, data={})
    ratio = torch.exp(log_prob - old).detach()
    plain = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
    with integrations.apply("verl_omni"):
        result = registry["flow_grpo_fused"](config=config, model_output=output, data=data)
    torch.testing.assert_close(result.loss.detach(), plain)
    assert result.metrics["actor/pg_clipfrac_higher"] == pytest.approx(1 / 3)
