"""Guard Ops inside the trainers people already run: one import, one line.

    import guard_ops.integrations
    guard_ops.integrations.apply("flow_grpo")

See docs/swap-in.md for every framework's diff and for what differs from docs/math.md.
"""

from __future__ import annotations

from . import dance_grpo, flow_factory, flow_grpo, verl_omni
from .patch import Patch, Target, replace

__all__ = ["FRAMEWORKS", "Patch", "apply"]

_SCRIPTS = (
    "flux",
    "flux_lora",
    "hunyuan",
    "qwenimage",
    "qwenimage_edit",
    "skyreels_i2v",
    "wan_2_1",
)
TARGETS: dict[str, tuple[Target, ...]] = {
    "flow_grpo": (
        Target(
            ("flow_grpo.diffusers_patch.sd3_sde_with_logprob",),
            "sde_step_with_logprob",
            flow_grpo.sde_step_with_logprob,
        ),
    ),
    "dance_grpo": (
        Target(
            ("__main__", *(f"fastvideo.train_grpo_{script}" for script in _SCRIPTS)),
            "flux_step",
            dance_grpo.flux_step,
        ),
    ),
    "verl_omni": (
        Target(
            ("verl_omni.pipelines.schedulers.flow_match_sde",),
            "FlowMatchSDEDiscreteScheduler.sample_previous_step",
            verl_omni.sample_previous_step,
        ),
    ),
    "flow_factory": (
        Target(
            ("flow_factory.scheduler.flow_match_euler_discrete",),
            "FlowMatchEulerDiscreteSDEScheduler.step",
            flow_factory.step,
        ),
    ),
}
FRAMEWORKS = tuple(TARGETS)

_applied: dict[str, Patch] = {}


def apply(framework: str) -> Patch:
    """Put the fused functions under an importable framework's own names.

    Every module that holds the original is changed, also one that imported it by name. A second
    call returns the patch of the first. ``verl_omni`` also gets the losses ``flow_grpo_fused`` and
    ``grpo_guard_fused`` in its registry.

    Args:
        framework: one of ``FRAMEWORKS``: flow_grpo, dance_grpo, verl_omni, flow_factory.

    Returns:
        Patch: ``print`` it to see what was replaced, ``.undo()`` it, or use it in a ``with``.

    Raises:
        ValueError: there is no such framework, or its functions do not look as expected (it is
            another version); nothing is replaced then.
        ImportError: the framework cannot be imported.
    """
    if framework not in TARGETS:
        raise ValueError(f"`framework` is {framework!r}; it needs one of {', '.join(FRAMEWORKS)}")
    if framework in _applied and _applied[framework].active:
        return _applied[framework]
    patch = replace(framework, TARGETS[framework])
    if framework == "verl_omni":
        try:
            verl_omni.register()
        except ImportError:
            patch.undo()
            raise
        patch._on_undo.append(verl_omni.unregister)
    _applied[framework] = patch
    return patch
