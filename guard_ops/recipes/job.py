"""``guard-ops train RECIPE``: from settings to a trained model."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import guard_ops as go

from ..policies import POLICIES, ModelFolder, PipelinePolicy, PolicySettings, look
from ..rewards import load_reward
from ..rewards.combine import call
from ..trainer import draws, state
from ..trainer.config import TrainConfig
from ..trainer.engine import Engine
from ..trainer.folder import FolderLock, keep_aside, write_whole, writing
from ..trainer.judging import Judging
from ..trainer.policy import Reward
from ..trainer.prompts import Prompts, read_prompts
from ..trainer.trainer import Trainer
from ..trainer.window import Window
from .config import Recipe
from .held_out import HeldOut, features_of, held_out_prompts
from .pictures import write_grid
from .prompt_sets import prompt_file
from .resolve import as_yaml, written_by_a_run
from .trackers import Trackers, check_trackers

EXPORTS = ("lora", "lora-average", "weights", "weights-average")
EVALUATION_SEED = 2**40  # of pictures, whatever the run's seed: always from the same latents


def guard_config(recipe: Recipe) -> go.GuardConfig:
    """The objective, with the recipe's clip and KL."""
    changes: dict[str, Any] = {
        "kl_beta": recipe.kl_beta,
        "adv_clip": recipe.advantage_clip,
        "nonfinite": recipe.nonfinite,
    }
    if recipe.clip is not None:
        changes |= {"clip_low": recipe.clip, "clip_high": recipe.clip}
    make: Any = getattr(go.GuardConfig, recipe.objective)
    config: go.GuardConfig = make(**changes)
    return config


def train_config(recipe: Recipe) -> TrainConfig:
    """The trainer's settings."""
    window = Window(
        kind=recipe.window,
        size=recipe.window_size,
        first=recipe.window_first,
        last=recipe.window_last,
        every=recipe.window_every,
        stride=recipe.window_stride,
        outside=recipe.outside,
        branch=recipe.branch,
    )
    same = {f.name for f in dataclasses.fields(TrainConfig)} & set(vars(recipe)) - {"window"}
    return TrainConfig(
        **{name: getattr(recipe, name) for name in same},
        window=window,
        tensorboard="tensorboard" in recipe.trackers,
    )


def policy_settings(recipe: Recipe) -> PolicySettings:
    """How the pipeline is sampled."""
    names = {f.name for f in dataclasses.fields(PolicySettings)} - {"dtype"}
    values = {name: getattr(recipe, name) for name in names}
    return PolicySettings(**values, dtype=getattr(torch, recipe.dtype))


@dataclasses.dataclass
class Checked:
    """What a recipe names, found and checked; no weight is loaded."""

    recipe: Recipe
    prompts: Prompts
    folder: ModelFolder
    settings: PolicySettings
    config: TrainConfig
    guard: go.GuardConfig
    reward: Reward
    gold: Reward | None  # with the prompts it is asked on
    held_out: Prompts | None


def reward_of(recipe: Recipe, prompts: Prompts | None) -> Reward:
    """The reward, of which nothing is loaded; ``prompts`` are such as it can judge.

    Raises:
        ValueError: see :func:`guard_ops.rewards.load_reward`; a prompt that the reward cannot
            judge, such as one without GenEval's metadata.
    """
    reward = load_reward(
        recipe.reward, recipe.reward_options, recipe.reward_weights, recipe.reward_advantages
    )
    if prompts is not None:
        call(reward, "check_prompts", prompts.texts, prompts.metadata)
    return reward


def gold_of(recipe: Recipe, reward: Reward, prompts: Prompts, ranks: int) -> tuple[Reward, Prompts]:
    """The monitor's reward and prompts, of which nothing is loaded.

    Raises:
        ValueError: there are none, or training sees them too.
    """
    if recipe.gold_samples < max(2, ranks):
        raise ValueError(f"`gold_samples` is {recipe.gold_samples}; it needs >= {max(2, ranks)}")
    if (recipe.gold, recipe.gold_options) == (recipe.reward, recipe.reward_options):
        raise ValueError(f"`gold` is {recipe.gold!r}, which is the `reward` that is trained on")
    features_of(recipe.gold_features)
    gold = load_reward(recipe.gold, recipe.gold_options)
    held_out = held_out_prompts(recipe, prompts)
    for judge in (reward, gold):
        call(judge, "check_prompts", held_out.texts, held_out.metadata)
    return gold, held_out


def check(recipe: Recipe, ranks: int) -> Checked:
    """Everything that can be wrong with a recipe, before a weight is loaded.

    Raises:
        ValueError: of prompts, model, reward, sizes, more ranks than samples; names the key.
    """
    check_numbers(recipe)
    config, guard, settings = train_config(recipe), guard_config(recipe), policy_settings(recipe)
    draws.shares(config.samples, config.minibatches, ranks)
    check_reference(recipe, ranks)
    prompts = read_prompts(prompt_file(recipe.prompts))
    if len(prompts.texts) < recipe.prompts_per_iteration:
        raise ValueError(
            f"`prompts` {recipe.prompts!r} has {len(prompts.texts)} prompts; "
            f"`prompts_per_iteration` {recipe.prompts_per_iteration} needs at least as many"
        )
    reward = reward_of(recipe, prompts)
    check_trackers(recipe.trackers)
    folder = look(recipe.model, POLICIES)
    check_frames(POLICIES[folder.pipeline], recipe)
    gold, held_out = gold_of(recipe, reward, prompts, ranks) if recipe.gold else (None, None)
    return Checked(recipe, prompts, folder, settings, config, guard, reward, gold, held_out)


def check_numbers(recipe: Recipe) -> None:
    """Raises ValueError for a number that nothing else looks at before the weights are loaded."""
    if not 0 < recipe.timeout < math.inf:
        raise ValueError(f"`timeout` is {recipe.timeout}; it needs > 0 and finite")
    lowest = {"evaluation_prompts": 0, "evaluation_steps": 2}
    if recipe.train == "lora":
        lowest["lora_rank"] = 1
    for name, least in lowest.items():
        if getattr(recipe, name) < least:
            raise ValueError(f"`{name}` is {getattr(recipe, name)}; it needs >= {least}")
    if not math.isfinite(recipe.lora_alpha):
        raise ValueError(f"`lora_alpha` is {recipe.lora_alpha}; it needs a finite number")


def check_reference(recipe: Recipe, ranks: int) -> None:
    """Raises ValueError for a frozen copy of a sharded model, which each rank would hold whole."""
    if recipe.kl_beta and recipe.train == "full" and recipe.sharding == "fsdp" and ranks > 1:
        raise ValueError(
            f"`kl_beta` is {recipe.kl_beta} with train=full and sharding=fsdp on {ranks} ranks, "
            "each of which would hold two whole models to load them; it needs 0, train=lora or "
            "sharding=ddp"
        )


def check_frames(kind: type[PipelinePolicy], recipe: Recipe) -> None:
    """Raises ValueError for frames of an image."""
    if recipe.frames != 1 and not kind.video:
        raise ValueError(f"`frames` is {recipe.frames}; {kind.pipeline} makes images, of 1 frame")


def load_policy(checked: Checked, device: torch.device, encodings: Path) -> PipelinePolicy:
    """The policy as it is before training, with what is to be trained set up."""
    recipe, full = checked.recipe, checked.recipe.train == "full"
    policy = POLICIES[checked.folder.pipeline].load(
        checked.folder,
        checked.settings,
        encodings=encodings,
        device=device,
        trained_dtype=torch.float32 if full else None,
        empty=full and recipe.sharding == "fsdp" and not recipe.kl_beta,
    )
    if full:
        if recipe.kl_beta:
            policy.keep_reference()
        policy.transformer.requires_grad_(True)
    else:
        seeded = torch.random.fork_rng(devices=[])  # every rank, and every resumption, begins alike
        with seeded:
            torch.manual_seed(recipe.seed)
            policy.add_lora(recipe.lora_rank, recipe.lora_alpha, recipe.lora_targets)
    if recipe.compile:
        policy.compile_blocks()
    return policy


def train(recipe: Recipe) -> Path:
    """Train as the recipe says; returns the folder of the exported weights.

    Raises:
        ValueError: see :func:`check` and :class:`~guard_ops.trainer.Trainer`.
    """
    full = recipe.train == "full"
    checked = check(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    dtype = getattr(torch, recipe.dtype)
    engine = Engine(
        recipe.sharding,
        param_dtype=dtype if full else None,
        reduce_dtype=torch.float32 if full else None,
        timeout=recipe.timeout,
    )
    try:
        return _train(checked, engine)
    finally:
        engine.close()


def _train(checked: Checked, engine: Engine) -> Path:
    recipe, out = checked.recipe, Path(checked.recipe.out)
    engine.first(lambda: _refuse_folder(checked, out))
    encodings = Path(recipe.encodings) if recipe.encodings else out / "encodings"
    with engine.together():
        for reward in (checked.reward, checked.gold):
            if reward is not None:  # what is not there stops the run before it has begun
                call(reward, "fetch")
    policy = load_policy(checked, engine.device, encodings)
    _encode_all(policy, checked, engine)
    call(checked.reward, "prepare", engine.device)
    held_out: HeldOut | None = None
    trackers: Trackers | None = None
    evaluation = Evaluation(policy, checked, engine, out)

    def evaluate() -> dict[str, float]:
        numbers = evaluation() if recipe.evaluation_prompts else {}
        return numbers if held_out is None else held_out() | numbers

    trainer = Trainer(
        policy,
        checked.reward,
        checked.prompts.texts,
        checked.guard,
        checked.config,
        out,
        metadata=checked.prompts.metadata,
        engine=engine,
        resume=recipe.resume,
        evaluate=evaluate if recipe.evaluation_prompts or checked.gold else None,
        observe=lambda *line: observe(*line),
        recipe=_must_match(recipe),
    )

    def observe(iteration: int, numbers: dict[str, Any]) -> None:
        if trackers is not None:
            trackers.log(iteration, numbers)
            if evaluation.pixels is not None:
                trackers.show(iteration, evaluation.pixels)
                evaluation.pixels = None

    try:
        evaluation.trainer = trainer
        if engine.rank == 0:
            _set_others_aside(out, begun=trainer.iteration == 0)
            write_whole(out / "recipe.yaml", as_yaml(recipe).encode())
            trackers = Trackers(recipe.trackers, out, dataclasses.asdict(recipe))
        if checked.gold is not None and checked.held_out is not None:
            call(checked.gold, "prepare", engine.device)
            features = features_of(recipe.gold_features)
            held_out = HeldOut(
                policy, trainer, recipe, checked.gold, checked.held_out, features, out
            )
            if not trainer.iteration:
                held_out()
                trainer.keep_best()
        trainer.fit(title=out.name)
        if held_out is not None and held_out.monitor.readings and engine.rank == 0:
            print(held_out.monitor.verdict())
        folder = _export(policy, trainer, engine, out)
        if engine.rank == 0:
            print(f"trained weights, for diffusers: {folder}", flush=True)
        return folder
    finally:
        if trackers is not None:
            trackers.close()
        trainer.close()


def _refuse_folder(checked: Checked, out: Path) -> None:
    """What the trainer would refuse, before a model is loaded for it."""
    if not out.exists():
        return
    prompts, recipe = checked.prompts, checked.recipe
    chosen = state.chosen(
        prompts.texts, prompts.metadata, checked.guard, checked.config, _must_match(recipe)
    )
    lock = FolderLock(out)
    try:
        state.refuse_another_run(out / "checkpoints", recipe.resume, chosen)
    finally:
        lock.release()


def _set_others_aside(out: Path, *, begun: bool) -> None:
    """Keep a recipe that no run wrote and, where a run begins, what an earlier one exported."""
    found = [out / "recipe.yaml"] if not written_by_a_run(out / "recipe.yaml") else []
    if begun:
        found += [out / name for name in EXPORTS]
    for path in found:
        if os.path.lexists(path):
            keep_aside(path)


def _encode_all(policy: PipelinePolicy, checked: Checked, engine: Engine) -> None:
    """Each rank encodes some of the prompts; afterwards they are on disk for all."""
    held_out = [] if checked.held_out is None else checked.held_out.texts
    texts = [*checked.prompts.texts, *held_out, checked.settings.negative_prompt]
    assert policy.encodings is not None
    with engine.together():
        policy.encodings.prepare(texts[engine.rank :: engine.ranks])


def _must_match(recipe: Recipe) -> dict[str, Any]:
    """What a continued run shares with its beginning, beside what the trainer compares itself."""
    names = (
        *("reward", "reward_options", "reward_weights", "reward_advantages"),
        *("model", "objective", "height", "width", "frames", "guidance_scale"),
        *("gold", "gold_options", "gold_prompts", "gold_samples", "gold_features"),
        *("guidance_gradient", "negative_prompt", "text_length", "train", "dtype"),
        *("lora_rank", "lora_alpha", "lora_targets"),
    )
    return {name: getattr(recipe, name) for name in names}


class Evaluation:
    """Samples of the first prompts without noise, with the averaged weights; a grid on disk."""

    trainer: Trainer

    def __init__(self, policy: PipelinePolicy, checked: Checked, engine: Engine, out: Path) -> None:
        self.policy, self.engine, self.out = policy, engine, out
        self.recipe = checked.recipe
        count = min(checked.recipe.evaluation_prompts, len(checked.prompts.texts))
        self.texts = checked.prompts.texts[:count]
        self.metadata = checked.prompts.metadata[:count]
        self.pixels: Tensor | None = None  # of the last evaluation

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        averaged = bool(self.recipe.ema_decay)
        with self.trainer.ema.applied() if averaged else nullcontext():
            pixels = self._sample()
        size, loop = self.recipe.decode_batch, self.trainer.loop
        judging = Judging(loop.judge)
        for k in range(0, len(pixels), size):
            rows = slice(k, k + size)
            judging.add(pixels[rows], self.texts[rows], self.metadata[rows])
        scores = loop.scores(judging)
        self.pixels = pixels.cpu()
        if self.engine.rank == 0:
            name = f"iteration-{self.trainer.iteration:06d}"
            write_grid(self.pixels, self.out / "pictures" / name)
        means = {f"evaluation_reward_{n}": x.nanmean() for n, x in scores.parts.items()}
        return {n: float(x) for n, x in {"evaluation_reward": scores.total.mean(), **means}.items()}

    def _sample(self) -> Tensor:
        """All pixels on every rank; each rank makes some of them."""
        engine, ranks = self.engine, self.engine.ranks
        sigmas, timesteps = self.policy.schedule(self.recipe.evaluation_steps)
        steps = go.SdeSchedule(sigmas, 0.0, device=engine.device)
        whole: Tensor | None = None
        for first in range(0, len(self.texts), ranks):
            # every rank makes as many calls, so that sharded weights are gathered together
            mine = min(first + engine.rank, len(self.texts) - 1)
            condition = self.policy.encode([self.texts[mine]])
            dice = torch.Generator().manual_seed(EVALUATION_SEED + mine)
            latents = torch.randn(1, *self.policy.latent_shape, generator=dice).to(engine.device)
            for k, coeffs in enumerate(steps):
                timestep = timesteps[k].to(engine.device).expand(1)
                velocity = self.policy.velocity(latents, timestep, condition)
                latents = go.sde_step(
                    velocity, latents, coeffs, noise=torch.zeros_like(latents)
                ).prev_sample
            pixels = self.policy.decode(latents)
            if whole is None:
                whole = pixels.new_zeros(len(self.texts), *pixels.shape[1:])
            if first + engine.rank < len(self.texts):
                whole[mine] = pixels[0]
        assert whole is not None
        return engine.joined(whole)


def _export(policy: PipelinePolicy, trainer: Trainer, engine: Engine, out: Path) -> Path:
    """The trained weights for diffusers, and their average if there is one."""
    kind = "lora" if policy.has_lora else "weights"
    folder = out / kind
    _export_on_first(policy, engine, folder)
    if trainer.config.ema_decay:
        with trainer.ema.applied():
            _export_on_first(policy, engine, out / f"{kind}-average")
    return folder


def _export_on_first(policy: PipelinePolicy, engine: Engine, folder: Path) -> None:
    """Written under another name first; what an earlier part of this run exported is replaced."""
    temporary, old = (folder.with_name(f"{folder.name}.{each}") for each in ("writing", "old"))
    first = engine.rank == 0
    with engine.together(), writing(temporary):
        if first and temporary.exists():  # a run was killed while it wrote this
            shutil.rmtree(temporary)
        policy.export(temporary, write=first)
    if first:
        with writing(folder):
            if old.exists():
                shutil.rmtree(old)
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
    engine.barrier()
