"""What the trainer does besides calling the network: operators, and waits for the device."""

from collections import Counter

import torch
from tiny import started, tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode

# Each needs a number, a size or a copy on the host, for which it waits for a device.
WAITS = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select", "unique",
    "_unique2", "lift_fresh", "_to_copy_to_host",
}  # fmt: skip
VIEWS = {
    "view", "select", "slice", "expand", "unbind", "detach", "t", "alias", "_unsafe_view",
    "reshape", "unsqueeze", "squeeze", "transpose", "permute", "split", "as_strided",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts operators by name, but those of the network."""

    def __init__(self, trainer):
        super().__init__()
        self.found, self.on, velocity = Counter(), True, trainer.policy.velocity

        def uncounted(*inputs):
            self.on = False
            try:
                return velocity(*inputs)
            finally:
                self.on = True

        trainer.policy.velocity = trainer.engine._velocity = uncounted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.on:
            self.found[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    def work(self):
        """How many are no views."""
        return sum(n for name, n in self.found.items() if name not in VIEWS)

    def waits(self):
        return {name for name in self.found if name in WAITS}


def trainer_of(tmp_path, **changes):
    # AdamW's step counters are on the host; SGD has none to be mistaken for the device's numbers.
    return tiny_trainer(
        tmp_path,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        checkpoint_every=0,
        **changes,
    )


def rollout_operators(tmp_path, chunk):
    trainer = trainer_of(tmp_path, rollout_batch=chunk)
    draw, counted = trainer.loop.draw(0), Operators(trainer)
    with counted:
        trainer.loop.rollout(draw)
    assert not counted.waits()
    return counted.work()


def test_a_denoising_step_has_at_most_4_operators_besides_the_network(tmp_path):
    one, two = (rollout_operators(tmp_path / str(n), n) for n in (16, 8))
    # One chunk more. A step is an operator, and a copy of each its latents and its velocities. A
    # chunk has its initial latents made (of zeros), copied, and its condition gathered.
    steps, chunk = 4, 5
    assert two - one == 3 * steps + chunk


def test_an_update_waits_for_nothing_and_its_operators_are_counted(tmp_path):
    trainer = trainer_of(tmp_path, micro_batch=3)
    loop, rollout, batches = started(trainer)
    counted = Operators(trainer)
    totals = []
    for on_policy in (True, False):
        counted.found.clear()
        with counted:
            loop.update(rollout, torch.randn(16), batches[0], on_policy=on_policy)
        assert not counted.waits()
        totals.append(counted.found["index"])
    # Each of 8 micro-batches gathers steps, samples, latents, timesteps, condition and gradient;
    # the loss gathers 3, and is one operator. Pass 1 gathers 5 for each of its calls.
    assert totals == [51, 51 + 3 * 5]
    assert counted.found["guard_loss"] == 1
