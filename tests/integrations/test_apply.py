"""``apply``: patches what it has proved, counts, undoes, and says what it leaves alone."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from dataclasses import dataclass

import pytest
import restated
import torch
from restated import module

import guard_ops.integrations as integrations
from guard_ops.integrations import verl_omni

pytest.importorskip("diffusers", reason="needs diffusers' schedulers")

IMAGES = "flow_grpo.diffusers_patch.sd3_sde_with_logprob"
WAN = "flow_grpo.diffusers_patch.wan_pipeline_with_logprob"
BAGEL = "flow_grpo.bagel.modeling.bagel.bagel"


def fused(function):
    """Whether it is ours that runs."""
    found = getattr(function, "__guard_ops__", None)
    return found is not None and found.active


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    for installation in integrations._installations.values():
        installation.remove()
        installation.handles = 0
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastvideo"]:
        del sys.modules[name]


@pytest.fixture
def flow_grpo_package(monkeypatch):
    """The patch module, a pipeline that imported its function by name, and that function."""
    held = [restated.flow_grpo_step()]
    defining = module(monkeypatch, IMAGES, sde_step_with_logprob=held[0])
    using = module(
        monkeypatch,
        "flow_grpo.diffusers_patch.sd3_pipeline_with_logprob",
        sde_step_with_logprob=held[0],
    )
    return defining, using, held


def test_every_reference_is_replaced_and_named(flow_grpo_package):
    defining, using, held = flow_grpo_package
    using.under_another_name = held[0]
    patch = integrations.apply("flow_grpo")
    for owner in (defining, using):
        assert fused(owner.sde_step_with_logprob)
        assert f"{owner.__name__}.sde_step_with_logprob" in patch.replaced
        assert owner.__name__ in str(patch)
    assert fused(using.under_another_name)
    assert f"{using.__name__}.under_another_name" in patch.replaced


def test_the_proof_is_in_the_patch_and_in_what_it_prints(flow_grpo_package):
    patch = integrations.apply("flow_grpo")
    (proof,) = patch.proofs.values()
    assert proof.cases > 10
    assert proof.largest < 1e-5
    assert proof.seconds < 10  # measured 0.2; the machine of the tests may be busy
    assert f"proved {IMAGES}.sde_step_with_logprob: {proof}" in str(patch)


def test_ours_is_called_like_the_original_and_looks_like_it(flow_grpo_package, scheduler):
    defining, _, held = flow_grpo_package
    x, v = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    args = (scheduler, v, scheduler.timesteps[:2], x, 0.5, x + 0.1)
    expected = held[0](*args, return_sqrt_dt=True)
    with integrations.apply("flow_grpo"):
        ours = defining.sde_step_with_logprob
        assert (ours.__module__, ours.__qualname__) == (IMAGES, held[0].__qualname__)
        for got, wanted in zip(ours(*args, return_sqrt_dt=True), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_twice_counts_and_undo_restores(flow_grpo_package):
    defining, using, held = flow_grpo_package
    first, second = integrations.apply("flow_grpo"), integrations.apply("flow_grpo")
    assert first.replaced == second.replaced
    first.undo()
    first.undo()
    assert not first.active
    assert second.active
    assert fused(defining.sde_step_with_logprob)
    second.undo()
    assert "undone" in str(second)
    for owner in (defining, using):
        assert owner.sde_step_with_logprob is held[0]
    assert integrations.apply("flow_grpo").active
    assert fused(using.sde_step_with_logprob)


def test_a_nested_with_leaves_the_outer_one(flow_grpo_package):
    defining, _, held = flow_grpo_package
    with integrations.apply("flow_grpo") as outer:
        with integrations.apply("flow_grpo"):
            assert fused(defining.sde_step_with_logprob)
        assert outer.active
        assert fused(defining.sde_step_with_logprob)
    assert defining.sde_step_with_logprob is held[0]


def test_undo_reaches_what_was_imported_by_name_meanwhile(flow_grpo_package, monkeypatch):
    defining, _, held = flow_grpo_package
    patch = integrations.apply("flow_grpo")
    late = module(monkeypatch, "a_late_script", step=defining.sde_step_with_logprob)
    out_of_reach = [defining.sde_step_with_logprob]
    patch.undo()
    assert late.step is held[0]
    assert not fused(out_of_reach[0])  # and it calls the original from now on


def test_a_later_wrapper_stays_and_calls_the_original_after_undo(flow_grpo_package):
    defining, *_ = flow_grpo_package
    patch = integrations.apply("flow_grpo")
    ours = defining.sde_step_with_logprob
    calls = []

    @functools.wraps(ours)
    def logged(*args, **kwargs):
        calls.append(fused(ours))
        return ours(*args, **kwargs)

    defining.sde_step_with_logprob = logged
    again = integrations.apply("flow_grpo")
    assert defining.sde_step_with_logprob is logged
    assert patch.active
    assert any("a wrapper of ours" in line for line in again.left_alone)
    again.undo()
    patch.undo()
    assert defining.sde_step_with_logprob is logged
    assert patch.left_alone == (
        f"{IMAGES}.sde_step_with_logprob: was changed after apply, and kept",
    )
    with pytest.raises(AttributeError):  # the original, which looks its step up in the scheduler
        logged(None, torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 2))
    assert calls == [False]


def test_a_reload_is_noticed_and_patched_again(flow_grpo_package):
    defining, _, _ = flow_grpo_package
    patch = integrations.apply("flow_grpo")
    reloaded = restated.flow_grpo_step()
    reloaded.__module__ = IMAGES
    defining.sde_step_with_logprob = reloaded
    assert not patch.active
    patch.rescan()
    assert patch.active
    assert fused(defining.sde_step_with_logprob)
    patch.undo()
    assert defining.sde_step_with_logprob is reloaded


def test_a_real_reload(tmp_path, monkeypatch):
    (tmp_path / "fastvideo").mkdir()
    (tmp_path / "fastvideo" / "__init__.py").touch()
    (tmp_path / "fastvideo" / "train_grpo_flux.py").write_text(
        "import restated\nflux_step = restated.flux_step()\nflux_step.__module__ = __name__\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    script = importlib.import_module("fastvideo.train_grpo_flux")
    patch = integrations.apply("dance_grpo")
    assert fused(script.flux_step)
    importlib.reload(script)
    assert not fused(script.flux_step)
    assert not patch.active
    with integrations.apply("dance_grpo"):
        assert fused(script.flux_step)
    assert patch.active


def test_holders_that_cannot_be_replaced_are_named(flow_grpo_package):
    _, _, held = flow_grpo_package
    part = functools.partial(held[0], None)

    def around():
        return inner

    inner = held[0]
    patch = integrations.apply("flow_grpo")
    words = "\n".join(patch.left_alone)
    assert "sde_step_with_logprob held by a list" in words
    assert "held by a functools.partial" in words
    assert "held by the closure of" in words
    assert around.__qualname__ in words
    assert not fused(part.func)


def test_a_class_that_holds_the_original_is_reached_or_named(flow_grpo_package, monkeypatch):
    defining, _, held = flow_grpo_package

    class Trainer:
        step = staticmethod(held[0])
        of_class = classmethod(held[0])
        of_itself = property(held[0])

    class Inherits(Trainer):
        pass

    with integrations.apply("flow_grpo") as patch:
        assert Trainer.step is Inherits.step is Trainer().step is defining.sde_step_with_logprob
        assert fused(Trainer.step)
        assert any(label.endswith("Trainer.step") for label in patch.replaced)
        assert not fused(Trainer.of_class.__func__)
        words = "\n".join(patch.left_alone)
        assert "held by a classmethod: it cannot be replaced there" in words
        assert "held by a property: it cannot be replaced there" in words
        assert "held by a staticmethod" not in words
        assert patch.rescan().active
        kept = [Trainer.__dict__["step"]]
    assert not patch.left_alone
    assert type(Trainer.__dict__["step"]) is staticmethod
    assert Trainer.step is held[0]
    assert "step" not in vars(Inherits)
    del kept
    loose = [staticmethod(held[0])]
    with integrations.apply("flow_grpo") as patch:
        assert "held by a staticmethod" in "\n".join(patch.left_alone)
        assert loose[0].__func__ is held[0]


def test_a_script_that_exec_runs_is_reached(flow_grpo_package):
    defining, _, _ = flow_grpo_package
    script = {"__name__": "a script", "defining": defining}
    exec("step = defining.sde_step_with_logprob", script)
    with integrations.apply("flow_grpo") as patch:
        assert fused(script["step"])
        assert "a script.step" in patch.replaced
    assert not hasattr(script["step"], "__guard_ops__")


# another function under the same name


def test_another_rule_is_refused_and_nothing_is_replaced(flow_grpo_package):
    """A published variant has no ``sde_type``, and is CPS."""
    defining, using, held = flow_grpo_package
    own = restated.flow_grpo_step()

    def sde_step_with_logprob(self, model_output, timestep, sample, noise_level=0.7,
                              prev_sample=None, generator=None):  # fmt: skip
        return own(self, model_output, timestep, sample, noise_level, prev_sample, generator, "cps")

    defining.sde_step_with_logprob = sde_step_with_logprob
    with pytest.raises(ValueError, match=r"result\[1\] differs by .*nothing was replaced"):
        integrations.apply("flow_grpo")
    assert defining.sde_step_with_logprob is sde_step_with_logprob
    assert using.sde_step_with_logprob is held[0]


def test_an_earlier_version_without_the_last_options_is_taken(flow_grpo_package):
    own = restated.flow_grpo_step()

    def earlier(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None,
                generator=None):  # fmt: skip
        return own(self, model_output, timestep, sample, noise_level, prev_sample, generator)

    defining, *_ = flow_grpo_package
    defining.sde_step_with_logprob = earlier
    with integrations.apply("flow_grpo"):
        assert fused(defining.sde_step_with_logprob)


def test_other_defaults_and_another_order_are_honoured(flow_grpo_package, scheduler):
    own = restated.flow_grpo_step()

    def other(self, timestep, sample, model_output, prev_sample=None, generator=None,
              sde_type="cps", noise_level=1.0):  # fmt: skip
        return own(self, model_output, timestep, sample, noise_level, prev_sample, generator,
                   sde_type)  # fmt: skip

    kept = [other]
    defining, *_ = flow_grpo_package
    defining.sde_step_with_logprob = other
    x, v = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    with integrations.apply("flow_grpo"):
        ours = defining.sde_step_with_logprob
        assert fused(ours)
        args = (scheduler, scheduler.timesteps[:2], x, v, x + 0.1)
        for got, wanted in zip(ours(*args), kept[0](*args), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        wrong = [(range(9), {}), (args, {"sample": x}), (args[:3], {}), (args, {"sigma_max": 1})]
        for given, named in wrong:  # too many, one twice, one missing, an unknown one
            with pytest.raises(TypeError):
                kept[0](*given, **named)
            with pytest.raises(TypeError, match="argument"):
                ours(*given, **named)


def test_an_unknown_parameter_is_refused(flow_grpo_package):
    def other(self, model_output, timestep, sample, eta=0.7, prev_sample=None):
        return "other"

    defining, *_ = flow_grpo_package
    defining.sde_step_with_logprob = other
    with pytest.raises(
        ValueError, match=r"it takes `eta`; guard_ops replaces a function of \(self,"
    ):
        integrations.apply("flow_grpo")


def test_a_missing_function_is_refused(flow_grpo_package):
    del flow_grpo_package[0].sde_step_with_logprob
    with pytest.raises(ValueError, match="has no sde_step_with_logprob; this version of flow_grpo"):
        integrations.apply("flow_grpo")


def test_unknown_and_absent_frameworks():
    with pytest.raises(ValueError, match=r"`framework` is 'trl'; it needs one of flow_grpo, dance"):
        integrations.apply("trl")
    with pytest.raises(ImportError, match="flow_factory cannot be imported here"):
        integrations.apply("flow_factory")
    with pytest.raises(TypeError, match="`modules` is 'os'; it needs a sequence of module names"):
        integrations.apply("dance_grpo", "os")


# flow_grpo's other models


def test_wan_and_bagel_are_covered_or_named(flow_grpo_package, monkeypatch):
    patch = integrations.apply("flow_grpo")
    assert f"{WAN}.sde_step_with_logprob: this module is not imported" in patch.left_alone
    wan = module(monkeypatch, WAN, sde_step_with_logprob=restated.wan_step())
    bagel = module(monkeypatch, BAGEL, Bagel=restated.bagel())
    assert not fused(wan.sde_step_with_logprob)
    patch.rescan()
    assert not any(WAN in line or BAGEL in line for line in patch.left_alone)
    assert fused(wan.sde_step_with_logprob)
    assert fused(bagel.Bagel._sde_step_with_logprob)
    assert len(patch.proofs) == 3
    patch.undo()
    assert not hasattr(bagel.Bagel._sde_step_with_logprob, "__guard_ops__")


def test_namesakes_are_proved_too_or_left_alone_with_the_reason(flow_grpo_package, monkeypatch):
    copied = module(monkeypatch, "my_fork.copied", sde_step_with_logprob=restated.flow_grpo_step())
    wan = module(monkeypatch, "my_fork.wan", sde_step_with_logprob=restated.wan_step())
    other = module(
        monkeypatch, "my_fork.other", sde_step_with_logprob=restated.flow_grpo_step(scale=1.1)
    )
    patch = integrations.apply("flow_grpo")
    assert fused(copied.sde_step_with_logprob)
    assert fused(wan.sde_step_with_logprob)
    assert not fused(other.sde_step_with_logprob)
    (reason,) = (line for line in patch.left_alone if line.startswith("my_fork.other"))
    assert "differs by" in reason
    with pytest.raises(ValueError, match=r"my_fork.other.sde_step_with_logprob is not what"):
        integrations.apply("flow_grpo", ["my_fork.other"])


# DanceGRPO, whose scripts define the step


def test_dance_grpo_patches_the_scripts_that_are_imported(monkeypatch):
    held = [restated.flux_step() for _ in range(2)]
    scripts = [
        module(monkeypatch, f"fastvideo.train_grpo_{name}", flux_step=held[k])
        for k, name in enumerate(("flux", "hunyuan"))
    ]
    with integrations.apply("dance_grpo") as patch:
        assert all(fused(script.flux_step) for script in scripts)
        assert len(patch.replaced) == len(patch.proofs) == 2
    assert [script.flux_step for script in scripts] == held


def test_nothing_else_is_imported(tmp_path, monkeypatch):
    """A script that raises at its import, and one that would train for a second time."""
    (tmp_path / "fastvideo").mkdir()
    for name in ("train_grpo_flux", "train_grpo_hunyuan", "train_grpo_wan_2_1"):
        (tmp_path / "fastvideo" / f"{name}.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="dance_grpo has nothing to replace here: no imported"):
        integrations.apply("dance_grpo")
    with pytest.raises(ImportError, match="train_grpo_flux: RuntimeError: imported"):
        integrations.apply("dance_grpo", ["fastvideo.train_grpo_flux"])
    held = restated.flux_step()
    held.__module__ = "__main__"
    monkeypatch.setattr(sys.modules["__main__"], "flux_step", held, raising=False)
    with integrations.apply("dance_grpo") as patch:
        assert fused(sys.modules["__main__"].flux_step)
        assert patch.replaced == ("__main__.flux_step",)
    assert sys.modules["__main__"].flux_step is held


def test_a_running_script_with_another_step_is_refused(monkeypatch):
    def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
        return restated.flux_step()(
            model_output, latents, 1.1 * eta, sigmas, index, prev_sample, grpo, sde_solver
        )

    flux_step.__module__ = "__main__"
    monkeypatch.setattr(sys.modules["__main__"], "flux_step", flux_step, raising=False)
    with pytest.raises(ValueError, match=r"__main__\.flux_step is not what guard_ops replaces"):
        integrations.apply("dance_grpo")


def test_what_no_flow_is_is_named(monkeypatch):
    module(monkeypatch, "fastvideo.train_grpo_flux", flux_step=restated.flux_step())
    module(monkeypatch, "fastvideo.models.stable_diffusion.ddim_with_logprob")
    patch = integrations.apply("dance_grpo")
    assert any("DDIM, a diffusion and no flow" in line for line in patch.left_alone)


# verl-omni


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


# Flow-Factory


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


@pytest.mark.parametrize("framework", integrations.FRAMEWORKS)
def test_the_real_framework(framework):
    """The installed framework, patched; none of them is on the package index today."""
    package = {"dance_grpo": "fastvideo"}.get(framework, framework)
    pytest.importorskip(package, reason=f"{framework} is not installed: not on the package index")
    with integrations.apply(framework) as patch:
        assert patch.replaced
