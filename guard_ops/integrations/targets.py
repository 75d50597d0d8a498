"""What :func:`guard_ops.integrations.apply` replaces in each framework, and what it cannot."""

from __future__ import annotations

from . import (
    dance_grpo,
    flow_factory,
    flow_factory_unipc,
    flow_grpo,
    flow_grpo_bagel,
    flow_grpo_wan,
    unirl,
    verl_omni,
)
from .cases import dance_grpo as dance_grpo_cases
from .cases import flow_factory as flow_factory_cases
from .cases import flow_grpo as flow_grpo_cases
from .cases import unirl as unirl_cases
from .cases import verl_omni as verl_omni_cases
from .discovery import Framework, Target

_SCRIPTS = (
    "flux",
    "flux_lora",
    "hunyuan",
    "qwenimage",
    "qwenimage_edit",
    "skyreels_i2v",
    "wan_2_1",
)

_FLOW_GRPO = Framework(
    "flow_grpo",
    (
        Target(
            ("flow_grpo.diffusers_patch.sd3_sde_with_logprob",),
            "sde_step_with_logprob",
            flow_grpo.sde_step_with_logprob,
            flow_grpo_cases.step,
            leads=True,
        ),
        Target(
            ("flow_grpo.diffusers_patch.wan_pipeline_with_logprob",),
            "sde_step_with_logprob",
            flow_grpo_wan.sde_step_with_logprob,
            flow_grpo_cases.wan_step,
        ),
        Target(
            ("flow_grpo.bagel.modeling.bagel.bagel",),
            "Bagel._sde_step_with_logprob",
            flow_grpo_bagel.sde_step_with_logprob,
            flow_grpo_cases.bagel_step,
        ),
    ),
)
_DANCE_GRPO = Framework(
    "dance_grpo",
    (
        Target(
            tuple(f"fastvideo.train_grpo_{script}" for script in _SCRIPTS),
            "flux_step",
            dance_grpo.flux_step,
            dance_grpo_cases.step,
        ),
    ),
    others={
        "fastvideo.models.stable_diffusion.ddim_with_logprob.ddim_step_with_logprob": (
            "DDIM, a diffusion and no flow"
        )
    },
)
_VERL_OMNI = Framework(
    "verl_omni",
    (
        Target(
            ("verl_omni.pipelines.schedulers.flow_match_sde",),
            "FlowMatchSDEDiscreteScheduler.sample_previous_step",
            verl_omni.sample_previous_step,
            verl_omni_cases.step,
            leads=True,
        ),
    ),
    register=verl_omni.register,
    unregister=verl_omni.unregister,
)
_FLOW_FACTORY = Framework(
    "flow_factory",
    (
        Target(
            ("flow_factory.scheduler.flow_match_euler_discrete",),
            "FlowMatchEulerDiscreteSDEScheduler.step",
            flow_factory.step,
            flow_factory_cases.euler_step,
            leads=True,
        ),
        Target(
            ("flow_factory.scheduler.unipc_multistep",),
            "UniPCMultistepSDEScheduler.step",
            flow_factory_unipc.step,
            flow_factory_cases.unipc_step,
        ),
    ),
)
_UNIRL = Framework(
    "unirl",
    (
        *(
            Target(
                ("unirl.sde.kernels",),
                f"{strategy}.denoise",
                unirl.denoise,
                unirl_cases.denoise,
                leads=True,
                inherited=True,
            )
            for strategy in ("FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy")
        ),
        Target(
            ("unirl.algorithms.flowdppo",),
            "_flowdppo_kl_adv_loss",
            unirl.flowdppo_kl_adv_loss,
            unirl_cases.flowdppo,
        ),
    ),
    others={"unirl.sde.kernels.DPM2Strategy": "a solver of the ODE, which has no density"},
)
KNOWN = {each.name: each for each in (_FLOW_GRPO, _DANCE_GRPO, _VERL_OMNI, _FLOW_FACTORY, _UNIRL)}
