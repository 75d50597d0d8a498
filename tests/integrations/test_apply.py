"""``apply``: patches every reference, counts, undoes, and names what it cannot reach."""

from __future__ import annotations

import functools
import importlib

import pytest
import restated
import torch
from patched import fused
from restated import module

import guard_ops.integrations as integrations

pytest.importorskip("diffusers", reason="needs diffusers' schedulers")
pytestmark = pytest.mark.usefixtures("nothing_stays")

IMAGES = "flow_grpo.diffusers_patch.sd3_sde_with_logprob"


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
