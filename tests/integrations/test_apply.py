"""``apply``: patches what it says, once, undoably, and refuses what it does not know."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass

import pytest
import torch

import guard_ops.integrations as integrations
from guard_ops.integrations import dance_grpo, flow_factory, flow_grpo, verl_omni


def module(monkeypatch, name, **members):
    """An importable module, with its packages, for the length of a test."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            new = types.ModuleType(path)
            new.__path__ = []
            monkeypatch.setitem(sys.modules, path, new)
            if i > 1:
                monkeypatch.setattr(
                    sys.modules[".".join(parts[: i - 1])], parts[i - 1], new, raising=False
                )
    for key, value in members.items():
        setattr(sys.modules[name], key, value)
    return sys.modules[name]


def their_sde_step(  # the parameters of the real one
    self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None,
    sde_type="sde", return_sqrt_dt=False,
):  # fmt: skip
    return "original"


@pytest.fixture
def flow_grpo_package(monkeypatch):
    """The patch module, and a pipeline that imported the function by name."""
    where = "flow_grpo.diffusers_patch.sd3_sde_with_logprob"
    defining = module(monkeypatch, where, sde_step_with_logprob=their_sde_step)
    using = module(
        monkeypatch,
        "flow_grpo.diffusers_patch.sd3_pipeline_with_logprob",
        sde_step_with_logprob=their_sde_step,
    )
    yield defining, using
    if "flow_grpo" in integrations._applied:
        integrations._applied.pop("flow_grpo").undo()


def test_every_reference_is_replaced_and_named(flow_grpo_package):
    patch = integrations.apply("flow_grpo")
    for owner in flow_grpo_package:
        assert owner.sde_step_with_logprob is flow_grpo.sde_step_with_logprob
        assert f"{owner.__name__}.sde_step_with_logprob" in patch.replaced
        assert owner.__name__ in str(patch)


def test_twice_is_once_and_undo_restores(flow_grpo_package):
    first = integrations.apply("flow_grpo")
    assert integrations.apply("flow_grpo") is first
    first.undo()
    first.undo()
    assert not first.active
    for owner in flow_grpo_package:
        assert owner.sde_step_with_logprob is their_sde_step
    again = integrations.apply("flow_grpo")
    assert again is not first
    assert flow_grpo_package[1].sde_step_with_logprob is flow_grpo.sde_step_with_logprob


def test_as_a_context_manager(flow_grpo_package):
    with integrations.apply("flow_grpo"):
        assert flow_grpo_package[0].sde_step_with_logprob is flow_grpo.sde_step_with_logprob
    assert flow_grpo_package[0].sde_step_with_logprob is their_sde_step


def test_another_signature_is_refused_and_nothing_is_replaced(flow_grpo_package):
    def other(self, model_output, timestep, sample, eta=0.7, prev_sample=None):
        return "other"

    defining, using = flow_grpo_package
    defining.sde_step_with_logprob = other
    with pytest.raises(ValueError, match=r"takes \(self, .*, eta=, .*\) but .*return_sqrt_dt=\)"):
        integrations.apply("flow_grpo")
    assert defining.sde_step_with_logprob is other
    assert using.sde_step_with_logprob is their_sde_step


def test_an_earlier_version_without_the_last_options_is_taken(flow_grpo_package):
    def earlier(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None,
                generator=None):  # fmt: skip
        return "earlier"

    defining, _ = flow_grpo_package
    defining.sde_step_with_logprob = earlier
    with integrations.apply("flow_grpo"):
        assert defining.sde_step_with_logprob is flow_grpo.sde_step_with_logprob
    assert defining.sde_step_with_logprob is earlier


def test_a_missing_function_is_refused(flow_grpo_package):
    del flow_grpo_package[0].sde_step_with_logprob
    with pytest.raises(ValueError, match="has no sde_step_with_logprob; this version of flow_grpo"):
        integrations.apply("flow_grpo")


def test_unknown_and_absent_frameworks():
    with pytest.raises(ValueError, match=r"`framework` is 'trl'; it needs one of flow_grpo, dance"):
        integrations.apply("trl")
    with pytest.raises(ImportError, match="flow_factory cannot be imported here"):
        integrations.apply("flow_factory")


def their_flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    return "original"


def test_dance_grpo_patches_every_script_that_is_there(monkeypatch):
    scripts = [
        module(monkeypatch, f"fastvideo.train_grpo_{name}", flux_step=their_flux_step)
        for name in ("flux", "hunyuan")
    ]
    with integrations.apply("dance_grpo") as patch:
        assert all(script.flux_step is dance_grpo.flux_step for script in scripts)
        assert len(patch.replaced) == 2
    assert all(script.flux_step is their_flux_step for script in scripts)


def test_dance_grpo_patches_a_running_script(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "flux_step", their_flux_step, raising=False)
    with integrations.apply("dance_grpo") as patch:
        assert sys.modules["__main__"].flux_step is dance_grpo.flux_step
        assert patch.replaced == ("__main__.flux_step",)
    assert sys.modules["__main__"].flux_step is their_flux_step


@pytest.fixture
def verl_package(monkeypatch):
    """verl-omni's scheduler and its loss registry, restated."""

    class FlowMatchSDEDiscreteScheduler:
        def sample_previous_step(
            self, sample, model_output, timestep=None, generator=None, per_token_timesteps=None,
            noise_level=0.7, prev_sample=None, sde_type="sde", return_logprobs=True,
            return_sqrt_dt=False, include_logprob_normalizer=True,
        ):  # fmt: skip
            return "original"

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
        FlowMatchSDEDiscreteScheduler=FlowMatchSDEDiscreteScheduler,
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
    original = scheduler.sample_previous_step
    with integrations.apply("verl_omni"):
        assert scheduler.sample_previous_step is verl_omni.sample_previous_step
        assert sorted(registry) == ["flow_grpo_fused", "grpo_guard_fused"]
        assert verl_omni.register() == ("flow_grpo_fused", "grpo_guard_fused")
    assert scheduler.sample_previous_step is original
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


def test_nothing_stays_replaced_when_the_registry_cannot_be_imported(verl_package, monkeypatch):
    scheduler, _ = verl_package
    original = scheduler.sample_previous_step
    name = "verl_omni.trainer.diffusion"
    monkeypatch.setitem(sys.modules, f"{name}.diffusion_algos", None)
    monkeypatch.delattr(sys.modules[name], "diffusion_algos")
    with pytest.raises(ImportError):
        integrations.apply("verl_omni")
    assert scheduler.sample_previous_step is original


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


def test_flow_factory_scheduler_method_is_replaced(monkeypatch, scheduler):
    @dataclass
    class SDESchedulerOutput:
        values: dict

        @classmethod
        def from_dict(cls, values):
            return cls(values)

    base = type(scheduler)

    class FlowMatchEulerDiscreteSDEScheduler(base):
        dynamics_type, is_eval, noise_level = "Flow-SDE", False, 0.7

        @property
        def current_sde_steps(self):
            return torch.arange(3)

        def step(
            self, noise_pred, timestep, latents, next_latents=None, timestep_next=None,
            generator=None, noise_level=None, compute_log_prob=True, return_dict=True,
            return_kwargs=("next_latents",), dynamics_type=None, sigma_max=None,
        ):  # fmt: skip
            return "original"

    name = "flow_factory.scheduler.flow_match_euler_discrete"
    FlowMatchEulerDiscreteSDEScheduler.__module__ = name
    module(
        monkeypatch,
        name,
        FlowMatchEulerDiscreteSDEScheduler=FlowMatchEulerDiscreteSDEScheduler,
        SDESchedulerOutput=SDESchedulerOutput,
    )
    theirs = FlowMatchEulerDiscreteSDEScheduler(shift=3.0)
    theirs.set_timesteps(8)
    x, v = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    with integrations.apply("flow_factory"):
        assert type(theirs).step is flow_factory.step
        out = theirs.step(v, theirs.timesteps[1], x, return_kwargs=["next_latents", "std_dev_t"])
        late = theirs.step(v, theirs.timesteps[5], x, return_kwargs=["next_latents", "std_dev_t"])
    assert sorted(out.values) == ["next_latents", "std_dev_t"]
    assert out.values["std_dev_t"].min() > 0
    assert not late.values["std_dev_t"].any()  # not one of the SDE's steps: the ODE's sample
    dt = theirs.sigmas[6] - theirs.sigmas[5]
    torch.testing.assert_close(late.values["next_latents"], x + dt * v)
    assert theirs.step(v, theirs.timesteps[1], x) == "original"


@pytest.mark.parametrize("framework", integrations.FRAMEWORKS)
def test_the_real_framework(framework):
    """The installed framework, patched; none of them is on the package index today."""
    package = {"dance_grpo": "fastvideo"}.get(framework, framework)
    pytest.importorskip(package, reason=f"{framework} is not installed: not on the package index")
    with integrations.apply(framework) as patch:
        assert patch.replaced
