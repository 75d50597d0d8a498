"""The loss of a training script: its own lines, read from its file and run.

A script computes its loss in the middle of its training loop. :func:`original` takes the statements
from one that assigns a name to the last that assigns another, where a ratio is formed between, and
runs them on a namespace with what the script has in scope there. :data:`TAILS` has each script's
lines beside the functions of ``guard_ops.integrations`` that a user would put in their place: a new
function is added there.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guard_ops.integrations import (
    dance_grpo,
    flow_factory,
    flow_grpo,
    flow_grpo_wan,
    unirl,
    verl_omni,
)

# The scripts clip at 1e-4, where float32 decides a ratio within 1e-7 of the bound either way.
CLIP, ADV_CLIP = 1e-3, 5.0


class Scene(NamedTuple):
    """One update: what the step returned and what the rollout stored."""

    log_prob: Tensor  # [B]
    old_log_prob: Tensor  # [B]
    mean: Tensor  # [B, *latent]
    old_mean: Tensor
    std_dev_t: Tensor | None  # as the step returns it
    sqrt_dt: Tensor  # [B, 1, ...]
    advantages: Tensor  # [B]
    call: dict[str, Any]  # the step's own operands, for functions that take the velocity


class Tail(NamedTuple):
    """A loss: of the script, and ours."""

    name: str
    original: Callable[[Path, Scene], Tensor]
    ours: dict[str, Callable[[Scene], Tensor]]  # by the function's name


def original(
    path: Path, first: str, last: str, scope: dict[str, Any], number: int = 0
) -> dict[str, Any]:
    """Run a script's statements from ``first =`` to ``last =``; the ``number``-th such place."""
    exec(_compiled(path, first, last, number), scope)
    return scope


@functools.cache
def _compiled(path: Path, first: str, last: str, number: int) -> CodeType:
    places = []
    for node in ast.walk(ast.parse(path.read_text())):
        for body in (getattr(node, name, None) for name in ("body", "orelse")):
            if isinstance(body, list):
                places += _between(body, first, last)
    places.sort(key=lambda lines: lines[0].lineno)
    return compile(ast.Module(body=places[number], type_ignores=[]), str(path), "exec")


def _between(body: list[ast.stmt], first: str, last: str) -> list[list[ast.stmt]]:
    """The longest straight run of statements from ``first =`` to the last ``last =``, if any."""
    ends = [k for k, each in enumerate(body) if _assigns(each, last, deep=True)]
    for begin, each in enumerate(body):
        lines = body[begin : ends[-1] + 1] if ends else []
        straight = all(isinstance(line, ast.Assign | ast.If) for line in lines)
        forms_ratio = any(_assigns(line, "ratio", deep=True) for line in lines)
        if _assigns(each, first, deep=False) and straight and forms_ratio:
            return [lines]
    return []


def _assigns(statement: ast.stmt, name: str, deep: bool) -> bool:
    nodes = ast.walk(statement) if deep else [statement]
    targets = [t for n in nodes if isinstance(n, ast.Assign) for t in n.targets]
    return any(isinstance(t, ast.Name) and t.id == name for t in targets)


def flow_grpo_script(script: str, guard: bool) -> Callable[[Path, Scene], Tensor]:
    """The loss of a training script of flow_grpo."""

    def run(path: Path, scene: Scene) -> Tensor:
        train = SimpleNamespace(clip_range=CLIP, adv_clip_max=ADV_CLIP, beta=0)
        scope = {
            "torch": torch,
            "config": SimpleNamespace(train=train, rationorm=guard),
            "sample": {
                "advantages": scene.advantages[:, None],
                "log_probs": scene.old_log_prob[:, None],
                "prev_sample_mean": scene.old_mean[:, None],
            },
            "j": 0,
            "log_prob": scene.log_prob,
            "prev_sample_mean": scene.mean,
            "std_dev_t": scene.std_dev_t,
            "sqrt_dt": scene.sqrt_dt,
        }
        loss: Tensor = original(path / "scripts" / script, "advantages", "loss", scope)["loss"]
        return loss

    return run


def dance_grpo_script(path: Path, scene: Scene) -> Tensor:
    """The loss of ``train_one_step``."""
    scope = {
        "torch": torch,
        "sample": {"advantages": scene.advantages, "log_probs": scene.old_log_prob[:, None]},
        "_": 0,
        "new_log_probs": scene.log_prob,
        "adv_clip_max": ADV_CLIP,
        "clip_range": CLIP,
        "args": SimpleNamespace(gradient_accumulation_steps=1),
        "train_timesteps": 2,
    }
    script = path / "fastvideo" / "train_grpo_flux.py"
    loss: Tensor = original(script, "advantages", "loss", scope)["loss"]
    return loss


def flow_factory_trainer(number: int) -> Callable[[Path, Scene], Tensor]:
    """The loss of ``GRPOTrainer`` (0) and of ``GRPOGuardTrainer`` (1)."""

    def run(path: Path, scene: Scene) -> Tensor:
        ranges = SimpleNamespace(clip_range=(-CLIP, CLIP), adv_clip_range=(-ADV_CLIP, ADV_CLIP))
        output = SimpleNamespace(
            log_prob=scene.log_prob,
            next_latents_mean=scene.mean,
            std_dev_t=scene.std_dev_t.flatten(),
            dt=-(scene.sqrt_dt.flatten() ** 2),
        )
        scope = {
            "torch": torch,
            "self": SimpleNamespace(training_args=ranges),
            "batch": {"advantage": scene.advantages, "next_latents_mean": scene.old_mean[:, None]},
            "output": output,
            "old_log_prob": scene.old_log_prob,
            "callback_index_map": {0: 0},
            "timestep_index": 0,
        }
        trainer = path / "flow_factory" / "trainers" / "grpo.py"
        loss: Tensor = original(trainer, "adv", "policy_loss", scope, number)["policy_loss"]
        return loss

    return run


_VERL = SimpleNamespace(diffusion_loss=SimpleNamespace(clip_ratio=CLIP, adv_clip_max=ADV_CLIP))


def verl_loss(loss: Any, scene: Scene, guard: bool) -> Tensor:
    """What a class of verl-omni's loss registry, or of ours, computes."""
    more = {}
    if guard:
        more = {
            "old_prev_sample_mean": scene.old_mean,
            "prev_sample_mean": scene.mean,
            "std_dev_t": scene.std_dev_t,
            "sqrt_dt": scene.sqrt_dt.flatten(),
        }
    found: Tensor = loss.compute_loss(
        old_log_prob=scene.old_log_prob,
        log_prob=scene.log_prob,
        advantages=scene.advantages,
        config=_VERL,
        **more,
    )[0]
    return found


def verl_registered(name: str, guard: bool) -> Callable[[Path, Scene], Tensor]:
    """The original class, from the imported module."""

    def run(path: Path, scene: Scene) -> Tensor:
        from verl_omni.trainer.diffusion import diffusion_algos

        return verl_loss(getattr(diffusion_algos, name), scene, guard)

    return run


def unirl_flowgrpo(path: Path, s: Scene) -> Tensor:
    """The loss of ``FlowGRPO`` over one step, [B, 1]."""
    module: Any = importlib.import_module("unirl.algorithms.flowgrpo")
    found = module._grpo_clip_loss(
        new_logp=s.log_prob[:, None],
        old_logp=s.old_log_prob[:, None],
        advantages=s.advantages[:, None],
        clip_range=CLIP,
    )
    loss: Tensor = found[0].mean()
    return loss


def unirl_flowdppo(path: Path, s: Scene) -> Tensor:
    """The loss of ``FlowDPPO`` over one step, of the function that ``apply`` replaces."""
    module: Any = importlib.import_module("unirl.algorithms.flowdppo")
    return _flowdppo(inspect.unwrap(module._flowdppo_kl_adv_loss), s)


def _flowdppo(function: Any, s: Scene) -> Tensor:
    module: Any = importlib.import_module("unirl.algorithms.flowdppo")
    trainer = SimpleNamespace(add_kl_coefficient=True, params=SimpleNamespace(eta=0.7))
    sigma_t = module.FlowDPPO._compute_sigma_t(
        trainer, SimpleNamespace(sigmas=s.call["schedule"].sigmas), [s.call["k"]], s.mean.device
    )
    found = function(
        new_logp=s.log_prob[:, None],
        old_logp=s.old_log_prob[:, None],
        new_means=s.mean[:, None],
        old_means=s.old_mean[:, None],
        advantages=s.advantages[:, None],
        sigma_t=sigma_t,
        kl_mask_threshold=1e-5,
    )
    loss: Tensor = found[0].mean()
    return loss


def _plain(scene: Scene) -> Tensor:
    return flow_grpo.grpo_loss(
        scene.log_prob,
        scene.old_log_prob,
        scene.advantages,
        clip_range=CLIP,
        adv_clip_max=ADV_CLIP,
    ).loss


def _guard(bias_reduction: Any) -> Callable[[Scene], Tensor]:
    return lambda s: (
        flow_grpo.grpo_guard_loss(
            s.log_prob,
            s.old_log_prob,
            s.mean,
            s.old_mean,
            s.std_dev_t,
            s.sqrt_dt,
            s.advantages,
            clip_range=CLIP,
            adv_clip_max=ADV_CLIP,
            bias_reduction=bias_reduction,
        ).loss
    )


def _dance(s: Scene) -> Tensor:
    return dance_grpo.grpo_loss(
        s.log_prob,
        s.old_log_prob,
        s.advantages,
        clip_range=CLIP,
        adv_clip_max=ADV_CLIP,
        gradient_accumulation_steps=1,
        train_timesteps=2,
    )


def _factory_guard(s: Scene) -> Tensor:
    return flow_factory.grpo_guard_loss(
        s.log_prob,
        s.old_log_prob,
        s.mean,
        s.old_mean,
        s.std_dev_t,
        -(s.sqrt_dt**2),
        s.advantages,
        clip_range=(-CLIP, CLIP),
        adv_clip_range=(-ADV_CLIP, ADV_CLIP),
    ).loss


def _flow_grpo_whole(guard: bool) -> Callable[[Scene], Tensor]:
    def run(s: Scene) -> Tensor:
        given, kind = _flow_grpo_given(s, guard), s.call["sde_type"]
        return flow_grpo.training_loss(*given, sde_type=kind).loss

    return run


def _wan_whole(s: Scene) -> Tensor:
    return flow_grpo_wan.training_loss(*_flow_grpo_given(s, False)).loss


def _flow_grpo_given(s: Scene, guard: bool) -> tuple[Any, ...]:
    """The scheduler, velocity, sample, timestep and config of a script of flow_grpo."""
    c = s.call
    at = c["schedule"].timesteps[c["k"]].expand(len(c["sample"]))
    sample = {
        "timesteps": at[:, None],
        "latents": c["sample"][:, None],
        "next_latents": c["prev_sample"][:, None],
        "log_probs": s.old_log_prob[:, None],
        "prev_sample_mean": s.old_mean[:, None],
        "advantages": s.advantages[:, None],
    }
    config = SimpleNamespace(
        rationorm=guard,
        train=SimpleNamespace(clip_range=CLIP, adv_clip_max=ADV_CLIP, beta=0),
        sample=SimpleNamespace(noise_level=0.7),
    )
    return c["schedule"], c["model_output"], sample, 0, config


def _dance_whole(s: Scene) -> Tensor:
    c = s.call
    args = SimpleNamespace(
        eta=0.3, clip_range=CLIP, adv_clip_max=ADV_CLIP, gradient_accumulation_steps=1
    )
    return dance_grpo.training_loss(
        args, c["model_output"], c["sample"], c["prev_sample"], s.old_log_prob, s.advantages,
        c["schedule"].sigmas, c["k"], 2,
    ).loss  # fmt: skip


def _verl_whole(mode: str) -> Callable[[Scene], Tensor]:
    def run(s: Scene) -> Tensor:
        c = s.call
        at = c["schedule"].timesteps[c["k"]].expand(len(c["sample"]))
        batch = {
            "all_latents": torch.stack([c["sample"], c["prev_sample"]], 1),
            "all_timesteps": at[:, None],
            "advantages": s.advantages[:, None],
            "old_log_probs": s.old_log_prob[:, None],
            "old_prev_sample_mean": s.old_mean[:, None],
        }
        settings = SimpleNamespace(loss_mode=mode, clip_ratio=CLIP, adv_clip_max=ADV_CLIP)
        algo = SimpleNamespace(noise_level=0.7, sde_type=c["sde_type"])
        return verl_omni.training_loss(
            c["schedule"], c["model_output"], batch, 0,
            SimpleNamespace(diffusion_loss=settings), SimpleNamespace(algo=algo),
        )[0]  # fmt: skip

    return run


def _factory_whole(guard: bool) -> Callable[[Scene], Tensor]:
    def run(s: Scene) -> Tensor:
        c = s.call
        t, t_next = (c["schedule"].timesteps[k].float() for k in (c["k"], c["k"] + 1))
        args = SimpleNamespace(
            clip_range=(-CLIP, CLIP), adv_clip_range=(-ADV_CLIP, ADV_CLIP), kl_beta=0
        )
        old = {"old_next_latents_mean": s.old_mean} if guard else {"old_log_prob": s.old_log_prob}
        return flow_factory.training_loss(
            c["schedule"], c["model_output"], t, t_next, c["sample"], c["prev_sample"],
            s.advantages, args, **old,
        ).loss  # fmt: skip

    return run


_GUARD_SCRIPT = "train_sd3_GRPO_Guard.py"
TAILS = {
    "flow_grpo": Tail(
        "flow_grpo/scripts/train_sd3.py",
        flow_grpo_script("train_sd3.py", False),
        {
            "flow_grpo.grpo_loss": _plain,
            "flow_grpo.training_loss": _flow_grpo_whole(False),
        },
    ),
    "flow_grpo, bagel": Tail(
        "flow_grpo/scripts/train_sd3.py",
        flow_grpo_script("train_sd3.py", False),
        {"flow_grpo.grpo_loss": _plain},
    ),
    "flow_grpo, guard": Tail(
        f"flow_grpo/scripts/{_GUARD_SCRIPT}",
        flow_grpo_script(_GUARD_SCRIPT, True),
        {
            "flow_grpo.grpo_guard_loss": _guard("batch"),
            "flow_grpo.training_loss": _flow_grpo_whole(True),
        },
    ),
    "flow_grpo, wan": Tail(
        "flow_grpo/scripts/train_wan2_1.py",
        flow_grpo_script("train_wan2_1.py", False),
        {"flow_grpo.grpo_loss": _plain, "flow_grpo_wan.training_loss": _wan_whole},
    ),
    "dance_grpo": Tail(
        "fastvideo/train_grpo_flux.py",
        dance_grpo_script,
        {"dance_grpo.grpo_loss": _dance, "dance_grpo.training_loss": _dance_whole},
    ),
    "verl_omni": Tail(
        "verl_omni FlowGRPOLoss",
        verl_registered("FlowGRPOLoss", False),
        {
            "flow_grpo_fused": lambda s: verl_loss(verl_omni.FlowGRPOFusedLoss, s, False),
            "verl_omni.training_loss": _verl_whole("flow_grpo"),
        },
    ),
    "verl_omni, guard": Tail(
        "verl_omni GRPOGuardLoss",
        verl_registered("GRPOGuardLoss", True),
        {
            "grpo_guard_fused": lambda s: verl_loss(verl_omni.GRPOGuardFusedLoss, s, True),
            "verl_omni.training_loss": _verl_whole("grpo_guard"),
        },
    ),
    "flow_factory": Tail(
        "flow_factory GRPOTrainer",
        flow_factory_trainer(0),
        {"flow_factory.training_loss": _factory_whole(False)},
    ),
    "flow_factory, guard": Tail(
        "flow_factory GRPOGuardTrainer",
        flow_factory_trainer(1),
        {
            "flow_factory.grpo_guard_loss": _factory_guard,
            "flow_factory.training_loss": _factory_whole(True),
        },
    ),
    "unirl": Tail("unirl FlowGRPO", unirl_flowgrpo, {}),
    "unirl, dppo": Tail(
        "unirl FlowDPPO",
        unirl_flowdppo,
        {"unirl.flowdppo_kl_adv_loss": lambda s: _flowdppo(unirl.flowdppo_kl_adv_loss, s)},
    ),
}
