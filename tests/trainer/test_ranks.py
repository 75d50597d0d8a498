"""Any number of ranks gives the weights of one process."""

import plain
import pytest
import ranks
import torch
from tiny import Double, TinyPolicy, started, tiny_trainer
from torch import nn

import guard_ops as go
from guard_ops.trainer.engine import Engine, whole

GUARDS = {
    "standardize": go.GuardConfig.article(),
    "closed_form": go.GuardConfig.paper(),
    "kl": go.GuardConfig.article(kl_beta=0.1),
}
SETTINGS = {"iterations": 1, "inner_epochs": 3, "minibatches": 1, "group_size": 7}
# 14 samples, of prompts whose samples are on any rank; 3 updates. 4 ranks have 4, 4, 3 and 3.


class Blocks(Double):
    """With blocks to shard."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.correction, self.prompt])


def train(engine, out, guard, changes):
    """Three AdamW updates; the weights in full, and the numbers."""
    settings = SETTINGS | {"micro_batch": 5, "rollout_batch": 2} | changes
    trainer = tiny_trainer(
        out, policy=Blocks(), guard=GUARDS[guard], engine=engine, checkpoint_every=0, **settings
    )
    numbers = [trainer.iterate() for _ in range(settings["iterations"])]
    return {name: whole(p.detach()).clone() for name, p in trainer.parameters.items()}, numbers


def first_update(engine, out):
    """The first update's ratios about 1, in float32 and bfloat16."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = TinyPolicy().to(dtype)
        trainer = tiny_trainer(f"{out}/{dtype}", policy=policy, engine=engine, checkpoint_every=0)
        loop, rollout, batches = started(trainer)
        advantages = torch.randn(len(rollout.draw.prompts))
        *_, metrics = loop.update(rollout, advantages, batches[0], on_policy=True)
        found += [metrics.ratio_std, metrics.ratio_bias, metrics.ratio_hat_std]
    return found


def everything(engine, out):
    """All of a number of ranks' cases in one start of the processes."""
    cases = {}
    for guard in GUARDS:
        cases[guard] = train(engine, f"{out}/{guard}", guard, {})
    uneven = {"minibatches": 2, "inner_epochs": 2, "group_size": 9, "prompts_per_iteration": 1}
    cases["uneven"] = train(engine, f"{out}/uneven", "standardize", uneven)
    cases["on policy"] = first_update(engine, f"{out}/policy")
    return cases


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return everything(Engine(device="cpu"), tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    "count, sharding",
    [
        (2, "ddp"),
        pytest.param(2, "fsdp", marks=pytest.mark.slow_suite),
        pytest.param(4, "ddp", marks=pytest.mark.slow_suite),
        (4, "fsdp"),
    ],
)
def test_three_updates_on_several_ranks_give_the_weights_of_one(tmp_path, alone, count, sharding):
    results = ranks.run(tmp_path, count, everything, tmp_path / "out", sharding=sharding)
    for result in results:
        for name in (*GUARDS, "uneven"):
            weights, numbers = result[name]
            expected, of_one = alone[name]
            assert plain.relative(weights, expected) < 1e-9, name
            for found, right in zip(numbers, of_one, strict=True):
                for key in right:
                    torch.testing.assert_close(found[key], right[key], rtol=1e-6, atol=1e-9)
        assert not any(x.any() for x in result["on policy"])
