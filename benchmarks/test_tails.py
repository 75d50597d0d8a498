"""The frameworks' one-call tails against the blocks they replace, [8, 16, 64, 64], two threads.

A block is what a training script does between the velocity and the loss, what it logs included,
and the backward to the velocity. ``guard_loss`` is :func:`guard_ops.guard_loss` on the same tensors
with the nearest objective (of GRPO-Guard the paper's, which is one pass); a tail has to reach most
of its speed-up. The tail of a coupled block (:class:`benchmarks.scripts.Contender`) moves 9 latents
where guard_loss moves 5, so it has to reach most of 5/9 of it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import measure, scripts
from benchmarks.results import Row

SHAPE = (8, 16, 64, 64)
ROUNDS, RACES, QUIET = 15, 3, 0.05
SHARE = 0.8  # of guard_loss's speed-up
COUPLED = 5 / 9  # v, x, y, the old mean and the gradient; and all but the gradient again


def contenders(name: str) -> dict[str, measure.Call]:
    """Loss and gradient of a framework's block, its tail and guard_loss."""
    block = scripts.CONTENDERS[name]
    batch, velocity = scripts.make_batch(SHAPE, block.kind)
    v = velocity.requires_grad_()
    fused = scripts.guard_loss(batch, block.guarded)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "original": lambda v: block.original(batch, v)[0],
        "tail": lambda v: block.tail(batch, v)[0],
        "guard_loss": fused,
    }

    def call(loss: Callable[[Tensor], Tensor]) -> measure.Call:
        def run() -> None:  # a velocity is not a leaf, so its gradient is handed on, not stored
            torch.autograd.grad(loss(v), v)

        return run

    return {key: call(loss) for key, loss in losses.items()}


@pytest.mark.parametrize("name", scripts.CONTENDERS)
def test_tail_has_most_of_guard_loss_speed_up(
    name: str, record: Callable[[str, Row], None]
) -> None:
    races: list[measure.Race] = []
    while len(races) < RACES and not any(found.noise <= QUIET for found in races):
        races.append(measure.race(contenders(name), rounds=ROUNDS, repeat="tail"))
    result = min(races, key=lambda found: found.noise)
    share = result.ratio("guard_loss", "tail")  # speed-ups over the same original
    record(
        "tails",
        {
            "block": name,
            **{f"{key}_ms": round(result.median(key) * 1e3, 3) for key in result.contenders},
            "times_faster": round(result.ratio("original", "tail"), 2),
            "share": round(share, 3),
            "noise": round(result.noise, 3),
            "rounds": ROUNDS,
            "shape": list(SHAPE),
        },
    )
    least = SHARE * (COUPLED if scripts.CONTENDERS[name].coupled else 1)
    assert share >= least * (1 - result.noise), (
        f"the tail has {share:.0%} of guard_loss's speed-up (noise {result.noise:.0%})"
    )
