"""``python -m benchmarks.trainer_update``: an update of the trainer against a loop over the steps.

The loop is what trainers do today: for each step a forward with a graph, the loss in plain PyTorch
on two log-probabilities, a backward; then one optimizer step. Both have the same network (an SD3
transformer with random weights, no text encoders), batch and calls with a graph. A time is that of
the fastest of interleaved runs, which whatever else the machine does disturbs least; memory is the
largest sum of what is allocated, from torch's profiler.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

import guard_ops as go
from guard_ops.trainer import Loop, Rollout, Schedule, TrainConfig, Trainer, Window, batches

STEPS, SAMPLES = 4, 8
BOUNDS = {"first_update": 1.02, "later_update": 1.35}


class Sd3(nn.Module):
    """SD3's transformer at a size for a CPU."""

    latent_shape = (16, 16, 16)

    def __init__(self) -> None:
        from diffusers import SD3Transformer2DModel

        super().__init__()
        torch.manual_seed(0)
        self.transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=4,
            attention_head_dim=32, num_attention_heads=4, joint_attention_dim=64,
            caption_projection_dim=128, pooled_projection_dim=64, pos_embed_max_size=16,
        )  # fmt: skip

    def schedule(self, steps: int) -> Schedule:
        sigmas = torch.linspace(1, 0, steps + 1)
        return Schedule(tuple(sigmas.tolist()), 1000 * sigmas[:-1])

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text = torch.randn(len(prompts), 32, 64, generator=torch.Generator().manual_seed(0))
        return {"text": text, "pooled": text[:, 0]}

    def velocity(
        self, latents: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]
    ) -> Tensor:
        result: Tensor = self.transformer(
            latents,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            timestep=timestep,
            return_dict=False,
        )[0]
        return result

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3]

    def reference(self) -> contextlib.AbstractContextManager[None]:
        raise NotImplementedError


def per_step_loop(loop: Loop, rollout: Rollout, advantages: Tensor, config: go.GuardConfig) -> None:
    """One update as a loop over the steps, each of which has its own loss."""
    parameters, optimizer = loop.learner.parameters, loop.learner.optimizer
    optimizer.zero_grad(set_to_none=True)
    for k, c in enumerate(loop.noise.steps[:STEPS]):
        x, y, old = rollout.latents[k], rollout.latents[k + 1], rollout.velocities[k]
        velocity = loop.policy.velocity(x, loop.timesteps[k].expand(len(x)), rollout.draw.condition)
        a, b, s = (float(value) for value in (c.a, c.b, c.s))
        log_prob, log_prob_old = (
            (-((y - (a * x + b * v)) ** 2) / (2 * s**2)).flatten(1).mean(1) for v in (velocity, old)
        )
        ratio = (log_prob - log_prob_old).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean() / STEPS
        loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimizer.step()
    loop.learner.ema.update()


def trainer_of(out: str, micro_batch: int) -> tuple[Loop, Rollout, batches.Minibatch]:
    """A loop with its first rollout, and all of it as one minibatch."""
    config = TrainConfig(
        iterations=1, prompts_per_iteration=1, group_size=SAMPLES, minibatches=1, steps=STEPS,
        window=Window(last=None), micro_batch=micro_batch, rollout_batch=SAMPLES,
        checkpoint_every=0, tensorboard=False,
    )  # fmt: skip
    guard = go.GuardConfig.flow_grpo()
    trainer = Trainer(Sd3(), lambda pixels, *_: pixels.mean((1, 2, 3)), ["a"], guard, config, out)
    loop = trainer.loop
    (batch, *_) = batches.minibatches(loop.shares, 0, config, 0, torch.device("cpu"))
    return loop, loop.rollout(loop.draw(0)), batch


def peak(work: Callable[[], object]) -> int:
    """The most bytes that ``work`` has allocated and not freed at any moment."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    deltas = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, delta in deltas:
        now += delta
        most = max(most, now)
    return most


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Processor time then has no threads in it that spin while they wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def times(folder: str, rounds: int = 40) -> dict[str, dict[str, float]]:
    """Seconds of a processor for each kind of update, and their ratios to the loop's.

    ``forward``: the network's calls without a graph, which a later update has besides the loop's.
    """
    loop, rollout, batch = trainer_of(folder, SAMPLES)
    advantages = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0))
    works: dict[str, Callable[[], object]] = {
        "per_step_loop": lambda: per_step_loop(loop, rollout, advantages, loop.guard),
        "forward": lambda: loop.velocities(rollout, batch),
        "first_update": lambda: loop.update(rollout, advantages, batch, on_policy=True),
        "later_update": lambda: loop.update(rollout, advantages, batch, on_policy=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            started = time.process_time()
            work()
            if number:  # the first makes the optimizer's state
                seconds[name].append(time.process_time() - started)
    least = {name: min(values) for name, values in seconds.items()}
    ratios = {name: least[name] / least["per_step_loop"] for name in ("forward", *BOUNDS)}
    return {"seconds": least, "ratio": ratios}


def memory(folder: str) -> dict[str, int]:
    """Bytes that gradients and one micro-batch's activations take, and a whole update."""
    loop, rollout, batch = trainer_of(folder, 1)
    advantages, step = torch.linspace(-1, 1, SAMPLES), torch.zeros(1, dtype=torch.int64)

    def micro_batches() -> None:
        for _ in range(2):  # the second has the gradients of the first beside it
            velocity = loop.policy.velocity(*loop._at(rollout, step, batch.rows[:1]))
            torch.autograd.backward([velocity], [rollout.velocities[0, :1]])

    def update() -> None:
        loop.update(rollout, advantages, batch, on_policy=False)

    update()  # makes the optimizer's state
    found = {}
    for name, work in (("micro_batch", micro_batches), ("update", update)):
        loop.learner.optimizer.zero_grad(set_to_none=True)
        found[name] = peak(work)
    return found | {"velocities": rollout.velocities.nbytes}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as out:
        print(json.dumps(times(f"{out}/times") | {"bytes": memory(f"{out}/memory")}, indent=1))
