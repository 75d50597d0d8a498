"""``--dry-run``: what a recipe comes to, without loading a weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..policies import POLICIES, PipelinePolicy, look
from ..policies.loading import empty_transformer
from ..policies.published import PUBLISHED
from ..trainer import draws
from ..trainer.prompts import read_prompts
from . import estimate, job
from .config import Recipe
from .estimate import GIB, Activations, Memory
from .prompt_sets import prompt_file
from .resolve import as_yaml

_SAID = {
    "frozen_weights": "frozen weights",
    "trained_weights": "trained weights, float32",
    "gradients": "gradients, float32",
    "optimizer": "AdamW's two moments, float32",
    "average": "average of the weights, float32",
    "unsharded_blocks": "two blocks unsharded",
    "cast_weights": "weights cast to dtype",
    "activations": "activations of a micro-batch",
    "rollout": "latents, velocities, their gradients",
    "conditions": "encoded prompts",
}


def describe(recipe: Recipe, gpus: int) -> str:
    """The report.

    Raises:
        ValueError: what :func:`job.check` raises; prompts are only looked at if they are given.
    """
    job.check_numbers(recipe)
    config, _ = job.train_config(recipe), job.guard_config(recipe)
    draws.shares(config.samples, config.minibatches, gpus)
    job.check_reference(recipe, gpus)
    prompts = read_prompts(prompt_file(recipe.prompts)) if recipe.prompts else None
    reward = job.reward_of(recipe, prompts)
    if recipe.gold and prompts:
        job.gold_of(recipe, reward, prompts, gpus)
    found = f"{len(prompts.texts)} in the file, " if prompts else ""
    policy = _empty(recipe)
    activation = estimate.activations(policy)
    trained_steps = config.window.size or len(config.window.steps(config.steps))
    most = trained_steps * -(-config.samples // (gpus * config.minibatches))
    memory = estimate.memory(
        policy,
        activation,
        gpus=gpus,
        sharded=recipe.sharding == "fsdp",
        samples=config.samples,
        steps=config.steps,
        trained_steps=trained_steps,
        micro_batch=min(recipe.micro_batch or most, most),
    )
    trained, frozen = estimate.parameters(policy)
    iteration = _tflop(activation, recipe, config.samples, trained_steps)
    text = estimate.condition_like(policy)["prompt"].shape[1]
    lines = [
        as_yaml(recipe).rstrip(),
        "",
        f"parameters        {trained:,} trained, {frozen:,} frozen",
        f"tokens            {policy.tokens():,} of the picture + {text:,} of the prompt",
        f"prompts           {found}{config.prompts_per_iteration} an iteration",
        f"samples           {config.samples:,} an iteration, {-(-config.samples // gpus):,} a GPU",
        f"optimizer steps   {config.inner_epochs * config.minibatches} an iteration",
        f"trained steps     {trained_steps} of {config.steps}",
        f"forward           {activation.flops / 1e12:.2f} TFLOP a sample and step, with guidance",
        f"iteration         {iteration:,.0f} TFLOP in rollout and update",
        "",
        *_memory_lines(memory, gpus, recipe.sharding, checkpointing=recipe.checkpointing),
    ]
    return "\n".join(lines)


def _tflop(a: Activations, recipe: Recipe, samples: int, trained_steps: int) -> float:
    """A backward is two forwards in full fine-tuning, one for a LoRA; recomputation is one."""
    forward = 1 + int(recipe.checkpointing)
    backward = 2 if recipe.train == "full" else 1
    update = (forward + backward) * trained_steps * recipe.inner_epochs
    updates = recipe.inner_epochs * recipe.minibatches
    again = trained_steps * recipe.inner_epochs * (updates - 1) / updates  # velocities, later ones
    return a.flops * samples * (recipe.steps + update + again) / 1e12


def _memory_lines(memory: Memory, gpus: int, sharding: str, *, checkpointing: bool) -> list[str]:
    how = f"{gpus} GPU{'s' if gpus > 1 else ''}, {sharding if gpus > 1 else 'one rank'}"
    lines = [f"estimated memory of a GPU in an update ({how}), GiB"]
    for name, said in _SAID.items():
        size = getattr(memory, name)
        if size:
            lines.append(f"  {said:<38} {size / GIB:8.2f}")
    lines.append(f"  {'total':<38} {memory.total / GIB:8.2f}")
    kept = "recomputed in the backward" if checkpointing else "all kept"
    lines.append(f"  (activations {kept}; without CUDA's context, fragments, and the decoder)")
    return lines


def _empty(recipe: Recipe) -> PipelinePolicy:
    """The policy on the meta device."""
    pipeline, config, scheduler = _configuration(recipe.model)
    settings = job.policy_settings(recipe)
    job.check_frames(POLICIES[pipeline], recipe)
    if "pos_embed_max_size" in config:  # a table of positions takes long to make; a part is enough
        needed = max(settings.height, settings.width) // 16
        config = {**config, "pos_embed_max_size": min(needed, config["pos_embed_max_size"])}
    full = recipe.train == "full"
    transformer = empty_transformer(config)
    transformer.to("meta")
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(settings.dtype)  # what they are computed in
    policy = POLICIES[pipeline](transformer, SimpleNamespace(config=scheduler), settings)
    if full:
        if recipe.kl_beta:
            policy.keep_reference()
        transformer.requires_grad_(True)
    else:
        from accelerate import init_empty_weights

        with init_empty_weights():
            policy.add_lora(recipe.lora_rank, recipe.lora_alpha, recipe.lora_targets)
    return policy


def _configuration(model: str) -> tuple[str, dict[str, Any], Mapping[str, Any]]:
    """Pipeline, the transformer's configuration, the scheduler's: of a folder, or as published."""
    if not Path(model).is_dir():
        for published in PUBLISHED.values():
            if published.model == model:
                return published.pipeline, dict(published.transformer), published.scheduler
    folder = look(model, POLICIES)
    return folder.pipeline, dict(folder.transformer), folder.scheduler
