"""What ``apply`` replaces, what it refuses, and what it leaves alone with a reason."""

from __future__ import annotations

import sys

import pytest
import restated
import torch
from patched import fused
from restated import module

import guard_ops.integrations as integrations

pytest.importorskip("diffusers", reason="needs diffusers' schedulers")
pytestmark = pytest.mark.usefixtures("nothing_stays")

WAN = "flow_grpo.diffusers_patch.wan_pipeline_with_logprob"
BAGEL = "flow_grpo.bagel.modeling.bagel.bagel"


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


@pytest.mark.parametrize("framework", integrations.FRAMEWORKS)
def test_the_real_framework(framework):
    """The installed framework, patched; none of them is on the package index today."""
    package = {"dance_grpo": "fastvideo"}.get(framework, framework)
    pytest.importorskip(package, reason=f"{framework} is not installed: not on the package index")
    with integrations.apply(framework) as patch:
        assert patch.replaced
