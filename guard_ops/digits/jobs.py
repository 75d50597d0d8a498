"""The digits job: one objective, the digits policy, its proxy reward and its gold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import guard_ops as go

from ..monitor import Monitor
from ..recipes.config import DigitsRecipe
from ..recipes.pictures import write_grid
from ..recipes.resolve import as_yaml, written_by_a_run
from ..trainer.config import TrainConfig
from ..trainer.engine import Engine
from ..trainer.folder import keep_aside, write_whole
from ..trainer.progress import progress_bar
from ..trainer.trainer import Trainer
from .judges import Gold, ProxyReward
from .policy import CLASSES, DigitPolicy, load_digits, sample, sigmas
from .pretraining import load_or_pretrain

OBJECTIVES: dict[str, go.GuardConfig] = {
    "flow_grpo": go.GuardConfig.flow_grpo(clip_low=1e-3, clip_high=1e-3),
    "paper": go.GuardConfig.paper(clip_low=1e-4, clip_high=1e-4),
    "article": go.GuardConfig.article(),
}
CLIPS = """\
The clips of the first two are 10 and 50 times the published ones: these latents have 64 elements
where an image model's have 65,536, so the ratio, a mean over elements, spreads wider."""

SCHEDULE = go.SdeSchedule(sigmas(10), noise_level=0.7, kind="flow_sde")
LEARNING_RATE = 4e-4
EVALUATION_SEED = 2**40  # no run has this seed; evaluation always samples from the same noise
EVALUATION_SAMPLES = 100  # per class


def judge(
    policy: DigitPolicy,
    proxy: ProxyReward,
    gold: Gold,
    monitor: Monitor | None = None,
    iteration: int = 0,
) -> dict[str, float]:
    """Proxy and gold of samples of the policy as it is now; a reading of the monitor."""
    samples, condition = sample(policy, SCHEDULE, EVALUATION_SAMPLES, EVALUATION_SEED)
    rewards, probability = proxy(samples, condition), gold.probability(samples, condition)
    numbers = {"proxy": float(rewards.mean()), **gold(samples, condition, probability)}
    if monitor is None:
        return numbers
    few = samples.unflatten(0, (CLASSES, -1))[:, :8].flatten(0, 1)
    write_grid(policy.decode(few), monitor.out / "pictures" / f"iteration-{iteration:06d}")
    reading = monitor.add(
        iteration,
        rewards,
        probability,
        samples.flatten(1).clamp(-1, 1),
        [str(label) for label in condition.tolist()],
    )
    return reading | numbers


def pretrained(folder: Path, seed: int, steps: int, title: str = "") -> DigitPolicy:
    """The pretrained policy of ``folder``, made if it is not there yet, with progress shown."""
    with progress_bar(f"{title}pretraining", steps) as bar:
        policy = load_or_pretrain(
            folder / "pretrained.safetensors", seed, steps, lambda n: bar(n, "")
        )
        bar(steps, "")
    return policy


def digits_trainer(
    policy: DigitPolicy,
    objective: str,
    config: TrainConfig,
    pretrain_steps: int,
    out: Path,
    judges: tuple[ProxyReward, Gold],
    *,
    engine: Engine | None = None,
    resume: bool = False,
    initialize: Callable[[], object] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> Trainer:
    """A trainer of ``policy`` with ``OBJECTIVES[objective]``, evaluated by :func:`judge`."""
    proxy, gold = judges
    return Trainer(
        policy,
        lambda pixels, prompts, metadata: proxy(*_asked(pixels, prompts)),
        [str(label) for label in range(CLASSES)],
        OBJECTIVES[objective],
        config,
        out,
        engine=engine,
        resume=resume,
        optimizer=lambda parameters: torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        ),
        evaluate=evaluate or (lambda: judge(policy, proxy, gold)),
        initialize=initialize,
        recipe={"objective": objective, "pretrain_steps": pretrain_steps},
    )


def _asked(pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The samples [B, 1, 8, 8] of pixels [B, 3, 8, 8], and the classes asked for."""
    return 2 * pixels[:, :1] - 1, torch.tensor([int(prompt) for prompt in prompts])


def train_digits(
    objective: str,
    config: TrainConfig,
    pretrain_steps: int,
    out: Path,
    engine: Engine,
    *,
    resume: bool,
    stop: bool = False,
    recipe: str | None = None,
) -> None:
    """Pretrain, and fine-tune with one objective; ``stop`` where the monitor raises its alarm.

    ``recipe`` is the text of ``recipe.yaml``.
    """
    digits, policy = load_digits(), DigitPolicy()

    def initialize() -> None:
        # the others read the file that the first rank has made
        engine.first(lambda: pretrained(out, config.seed, pretrain_steps) and None)
        file = out / "pretrained.safetensors"
        policy.load_state_dict(load_or_pretrain(file, config.seed, pretrain_steps).state_dict())

    judges = ProxyReward(digits), Gold(digits)

    def evaluate() -> dict[str, float]:
        def reading() -> dict[str, float]:
            return judge(policy, *judges, monitor, trainer.iteration)

        numbers, trainer.best, over = engine.first(
            lambda: (reading(), monitor.is_best, monitor.verdict().since is not None)
        )
        trainer.finished = over and stop
        return numbers

    trainer = digits_trainer(
        policy,
        objective,
        config,
        pretrain_steps,
        out,
        judges,
        engine=engine,
        resume=resume,
        initialize=initialize,
        evaluate=evaluate,
    )
    said = engine.rank == 0
    try:
        if said and recipe is not None:
            _write_recipe(out / "recipe.yaml", recipe)
        began = trainer.iteration
        monitor = Monitor(out, began)
        if not began:
            evaluate()
            trainer.keep_best()
        if said and began >= config.iterations:
            print(
                f"the run in {out} is at iteration {began} already; it goes on with `iterations` "
                f"above that, not {config.iterations}"
            )
        elif said and began:
            print(f"resuming after iteration {began}", flush=True)
        trainer.fit(title=objective)
        if said and began < trainer.iteration:
            print(monitor.verdict())
    finally:
        trainer.close()


def _write_recipe(path: Path, text: str) -> None:
    if path.exists() and not written_by_a_run(path):
        keep_aside(path)
    write_whole(path, text.encode())


def train_recipe(recipe: DigitsRecipe) -> None:
    """``guard-ops train digits``."""
    config = TrainConfig(
        iterations=recipe.iterations,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        checkpoint_every=recipe.checkpoint_every,
        evaluate_every=recipe.evaluate_every,
    )
    out = Path(recipe.out)
    engine = Engine(device="cpu")
    try:
        train_digits(
            recipe.objective,
            config,
            recipe.pretrain_steps,
            out,
            engine,
            resume=recipe.resume,
            stop=recipe.stop_over_optimizing,
            recipe=as_yaml(recipe),
        )
    finally:
        engine.close()
