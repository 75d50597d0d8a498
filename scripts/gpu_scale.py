"""One iteration of SD3.5-M and FLUX.1-dev at full size on a GPU, step by step: ``make gpu-scale``.

Needs no network: the networks have random weights, from their published configurations, with the
LoRA of the published recipe, at 512 px. Prompts are random embeddings, and the reward is random.
Each part of an iteration is timed, and its peak memory taken, with the fused loss and with plain
PyTorch's (backend ``reference``). Written to ``benchmarks/results/<device>.json``, section "scale".
Without a GPU it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import guard_ops as go  # noqa: E402
from guard_ops.benchmarks import results  # noqa: E402

SECONDS = 600.0  # the most that the script takes; a model that may not fit in it is left out
LEAST = {"sd3_5_medium": 60.0, "flux1_dev": 120.0}  # seconds that have to be left for it
GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=8, help="of an iteration; default: 8")
    parser.add_argument("--models", nargs="+", choices=LEAST, default=list(LEAST))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing was run, and nothing is written")
        return 0
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    failed = False
    for name in options.models:
        left = SECONDS - (time.monotonic() - began)
        if left < LEAST[name]:
            print(f"{name}: left out, {left:.0f} s are too few")
            continue
        try:
            rows += measure(name, torch.device("cuda"), options.samples)
        except torch.cuda.OutOfMemoryError as error:
            failed = True
            print(f"{name}: {str(error).splitlines()[0]}")
        torch.cuda.empty_cache()
        if rows:
            path = results.save("scale", rows, device="cuda")
    if rows:
        print(f"written to {path}")
    return int(failed)


def measure(
    name: str, device: torch.device, samples: int, words: Sequence[str] = (), config: Any = None
) -> list[dict[str, Any]]:
    """Rows of one model: an iteration with the fused loss, and one with the plain loss."""
    from guard_ops.recipes import job
    from guard_ops.recipes.resolve import resolve
    from guard_ops.trainer.ema import Ema
    from guard_ops.trainer.engine import Engine
    from guard_ops.trainer.learner import Learner
    from guard_ops.trainer.loop import Loop

    given = [
        "prompts=none", "prompts_per_iteration=2", f"group_size={samples // 2}",
        "rollout_batch=4", "micro_batch=1", *words,
    ]  # fmt: skip
    recipe = resolve(name, given)
    policy = random_policy(name, recipe, device, config)
    engine = Engine(device=device)
    engine.wrap(policy)
    parameters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate)
    learner = Learner(parameters, optimizer, Ema(parameters, recipe.ema_decay))
    loop = Loop(
        policy, _random_reward, ["a", "b"], [{}, {}], job.guard_config(recipe),
        job.train_config(recipe), engine, learner,
    )  # fmt: skip
    rows = []
    loop.iterate()  # compiles, allocates
    for loss, backend in (("fused", None), ("plain", "reference")):
        clock = Clock(device)
        with clock.timing(loop, optimizer):
            if backend is None:
                loop.iterate()
            else:
                with go.use_backend(backend):
                    loop.iterate()
        learner.iteration += 1
        row = {
            "model": name,
            "loss": loss,
            "samples": samples,
            "steps": recipe.steps,
            "trained_steps": loop.config.window.size or len(loop.config.window.steps(recipe.steps)),
            "parameters": sum(p.numel() for p in policy.parameters()),
            "trained": sum(p.numel() for p in parameters.values()),
            "seconds": clock.seconds,
            "peak_gib": clock.peaks,
        }
        rows.append(row)
        parts = ", ".join(f"{part} {value:.3f} s" for part, value in clock.seconds.items())
        print(f"{name}, {loss} loss: {parts}; peak {max(clock.peaks.values()):.2f} GiB", flush=True)
    return rows


# What the times of the trainer's methods are called, where it is not by their own names.
NAMES = {"_submit": "rewards", "scores": "rewards", "_push": "backward", "step": "optimizer"}


class Clock:
    """Seconds and peak memory of an iteration's parts; each is waited for, so parts add up."""

    PARTS = ("rollout", "_submit", "scores", "velocities", "objective", "_push", "update")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    def timing(self, loop: Any, optimizer: torch.optim.Optimizer) -> Any:
        """A context in which the loop's methods, and the optimizer's step, are timed."""
        return _Replaced([(loop, part) for part in self.PARTS] + [(optimizer, "step")], self._timed)

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        cuda = self.device.type == "cuda"

        def timed(*args: Any, **kwargs: Any) -> Any:
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            result = call(*args, **kwargs)
            if cuda:
                torch.cuda.synchronize()
            name, seconds = NAMES.get(part, part), time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            if part == "_submit":  # it is called in the rollout, which is timed without it
                self.seconds["rollout"] = self.seconds.get("rollout", 0.0) - seconds
            if part not in ("update", "objective"):  # the parts inside begin to count anew
                peak = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
                self.peaks[name] = max(self.peaks.get(name, 0.0), peak)
            return result

        return timed


class _Replaced:
    """Attributes of objects, replaced inside the block."""

    def __init__(self, places: list[tuple[Any, str]], make: Callable[..., Any]) -> None:
        self.places, self.make = places, make

    def __enter__(self) -> None:
        for owner, name in self.places:
            setattr(owner, name, self.make(name, getattr(owner, name)))

    def __exit__(self, *_: object) -> None:
        for owner, name in self.places:
            delattr(owner, name)


def random_policy(name: str, recipe: Any, device: torch.device, config: Any = None) -> Any:
    """The published network with random weights, and prompts that are random embeddings."""
    import diffusers

    from guard_ops.policies import POLICIES
    from guard_ops.policies.loading import empty_transformer
    from guard_ops.policies.published import PUBLISHED
    from guard_ops.recipes import estimate, job

    published = PUBLISHED[name]
    settings = job.policy_settings(recipe)
    network = dict(config or published.transformer)
    if "pos_embed_max_size" in network and config is None:
        network["pos_embed_max_size"] = settings.height // 16
    transformer = empty_transformer(network)
    generator = torch.Generator(device).manual_seed(0)
    for module in transformer.modules():
        for key, value in list(module._parameters.items()):
            if value is not None:
                filled = torch.randn(
                    value.shape, generator=generator, device=device, dtype=settings.dtype
                )
                module._parameters[key] = torch.nn.Parameter(filled * 0.02, requires_grad=False)
    transformer.to(device)
    kind = getattr(diffusers, published.scheduler["_class_name"])
    policy = POLICIES[published.pipeline](
        transformer, kind.from_config(published.scheduler), settings
    )
    policy.add_lora(recipe.lora_rank, recipe.lora_alpha, recipe.lora_targets)

    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        like = estimate.condition_like(policy, len(prompts))
        return {
            n: torch.ones(t.shape, dtype=t.dtype, device=device)
            if t.dtype == torch.bool
            else torch.randn(t.shape, device=device).to(t.dtype)
            for n, t in like.items()
        }

    policy.encodings = SimpleNamespace(encode=encode)
    policy.decode = lambda latents: latents  # the decoder is not measured
    return policy


def _random_reward(pixels: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    return torch.randn(len(pixels), device=pixels.device)


if __name__ == "__main__":
    sys.exit(main())
