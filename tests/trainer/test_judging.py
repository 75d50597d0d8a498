"""A reward that raises, hangs, returns NaN or the wrong length: tried again, then said."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import ranks
import torch
from tiny import reward, tiny_trainer

from guard_ops.trainer import Judge, RewardError, Scores
from guard_ops.trainer.decoupled import decoupled_advantages
from guard_ops.trainer.metrics import read_metrics

PIXELS = torch.rand(3, 3, 4, 4)
ASKED = PIXELS, ["a cat", "a dog", "a cup"], [{}, {}, {}]


class Faulty:
    """Right but for the prompt "a dog", ``times`` times."""

    def __init__(self, fault, times=10**9):
        self.fault, self.times, self.asked = fault, times, 0

    def __call__(self, pixels, prompts, metadata):
        self.asked += 1
        result = pixels.flatten(1).mean(1)
        if "a dog" in prompts and self.times > 0:
            self.times -= 1
            return self.fault(result, prompts)
        return result


def raises(result, prompts):
    raise ConnectionError("no such host")


def nan(result, prompts):
    return torch.where(torch.tensor([p == "a dog" for p in prompts]), float("nan"), result)


def hangs(result, prompts):
    time.sleep(3)
    return result


FAULTS = [
    (raises, r"raised ConnectionError: no such host, for the prompt 'a dog' \(asked 2 times\)"),
    (nan, r"returned nan, for the prompt 'a dog' \(asked 2"),
    (lambda r, p: r[:-1], r"returned of shape \(2,\) for 3 samples, for the prompts 'a cat', "),
    (
        lambda r, p: r.tolist(),
        r"returned a list; it needs a tensor \[B\], for the prompts 'a cat', 'a dog'",
    ),
]


@pytest.mark.parametrize("fault, message", FAULTS)
@pytest.mark.parametrize("thread", [{}, {"timeout": 5.0}, {"overlap": True}])
def test_a_fault_that_stays_names_the_prompt_and_one_that_passes_is_mended(fault, message, thread):
    with pytest.raises(RewardError, match=message):
        Judge(Faulty(fault), **thread)(*ASKED)
    once = Faulty(fault, times=1)
    scores = Judge(once, **thread)(*ASKED)
    assert torch.equal(scores.total, PIXELS.flatten(1).mean(1))
    assert once.asked == 2
    with pytest.raises(RewardError, match=r"asked once"):
        Judge(Faulty(fault), retries=0, **thread)(*ASKED)


def test_a_reward_that_hangs_is_left_behind():
    started = time.perf_counter()
    message = r"gave no answer in 0.1 s, for the prompts 'a cat', 'a dog', 'a cup' \(asked 2"
    with pytest.raises(RewardError, match=message):
        Judge(Faulty(hangs), timeout=0.1)(*ASKED)
    assert time.perf_counter() - started < 2
    assert torch.equal(
        Judge(Faulty(hangs, times=1), timeout=0.3)(*ASKED).total, PIXELS.flatten(1).mean(1)
    )


def test_parts_are_checked_and_may_lack_a_sample():
    parts = {"a": torch.tensor([1.0, float("nan"), 3.0])}
    scores = Judge(lambda *_: Scores(torch.ones(3), parts))(*ASKED)
    assert scores.parts["a"].isnan().tolist() == [False, True, False]
    with pytest.raises(RewardError, match="returned part 'b' of shape"):
        Judge(lambda *_: Scores(torch.ones(3), {"b": torch.ones(2)}))(*ASKED)


def weights(trainer):
    return [p.detach().clone() for p in trainer.parameters.values()]


@pytest.mark.parametrize("setting", [{}, {"reward_timeout": 20.0}, {"reward_overlap": True}])
def test_a_run_stops_with_the_state_before_the_fault_and_goes_on_to_the_same_bits(
    tmp_path, setting
):
    whole = tiny_trainer(tmp_path / "whole", rollout_batch=3)
    whole.fit(progress=False)

    calls = 0

    def broken(pixels, prompts, metadata):
        nonlocal calls
        calls += 1
        if calls > 6 * 3 + 2:  # 6 batches an iteration: in the fourth, whose checkpoint is not due
            raise OSError("disk gone")
        return reward(pixels, prompts, metadata)

    stopped = tiny_trainer(tmp_path / "run", reward=broken, rollout_batch=3, **setting)
    with pytest.raises(RewardError, match=r"disk gone, for the prompt .* iteration 4;"):
        stopped.fit(progress=False)
    assert stopped.iteration == 3
    stopped.close()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2, 3]

    resumed = tiny_trainer(tmp_path / "run", resume=True, rollout_batch=3)
    assert resumed.iteration == 3
    resumed.fit(progress=False)
    for a, b in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RewardError, match="no checkpoints are kept"):
        tiny_trainer(tmp_path / "none", reward=Faulty(raises).fault, checkpoint_every=0).fit(
            progress=False
        )


def test_a_fault_in_an_evaluation_loses_no_iteration(tmp_path):
    def evaluate():
        raise RewardError("the reward is gone")

    trainer = tiny_trainer(tmp_path, evaluate=evaluate, evaluate_every=3)
    with pytest.raises(RewardError, match="the reward is gone"):
        trainer.fit(progress=False)
    trainer.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert tiny_trainer(tmp_path, resume=True).iteration == 3


def test_a_reward_that_overlaps_works_while_the_next_samples_are_made(tmp_path):
    released = threading.Event()
    waited = []

    def patient(pixels, prompts, metadata):
        waited.append(released.wait(20))  # set by the second chunk's rollout
        return reward(pixels, prompts, metadata)

    trainer = tiny_trainer(tmp_path, reward=patient, rollout_batch=8, reward_overlap=True)
    original, calls = trainer.policy.velocity, []

    def velocity(*inputs):
        calls.append(1)
        if len(calls) == 5:
            released.set()
        return original(*inputs)

    trainer.policy.velocity = velocity
    trainer.iterate()
    assert waited == [True, True]


def test_parts_are_in_the_metrics(tmp_path):
    def two(pixels, prompts, metadata):
        total = reward(pixels, prompts, metadata)
        first = torch.tensor([prompt == "0" for prompt in prompts])
        return Scores(total, {"all": total, "zeros": torch.where(first, 2.0, float("nan"))})

    trainer = tiny_trainer(tmp_path, reward=two, iterations=3)
    trainer.fit(progress=False)
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert line["reward_all"] == pytest.approx(line["reward"])
        assert line["reward_zeros"] in (2.0, None)


def test_decoupled_advantages_are_of_each_reward_before_the_sum():
    """Two rewards whose spreads are 1 and 100: of a sum, the first would have no say."""
    groups = torch.tensor([0, 0, 0, 0])
    rewards = {"a": torch.tensor([0.0, 1, 0, 1]), "b": torch.tensor([0.0, 0, 100, 100])}
    found = decoupled_advantages(rewards, {"a": 1.0, "b": 1.0}, groups)
    # each is -1 or 1 (but for eps), the sum -2, 0, 0, 2 of spread sqrt(2)
    expected = torch.tensor([-2.0, 0, 0, 2]) / 2**0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    one = decoupled_advantages(rewards, {"a": 3.0, "b": 1.0}, groups)
    assert one.argsort().tolist() == [0, 2, 1, 3]
    with pytest.raises(ValueError, match="has 'c'; the reward's parts are a, b"):
        decoupled_advantages(rewards, {"c": 1.0}, groups)


def test_a_reward_with_advantage_weights_trains_on_them(tmp_path):
    class Two:
        advantage_weights = {"mean": 1.0, "negative": 1.0}  # noqa: RUF012

        def __call__(self, pixels, prompts, metadata):
            mean = pixels.flatten(1).mean(1)
            return Scores(mean, {"mean": mean, "negative": -mean})

    trainer = tiny_trainer(tmp_path, reward=Two())
    before = weights(trainer)
    trainer.iterate()  # the two advantages cancel
    for a, b in zip(before, weights(trainer), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def only_on_rank_1(pixels, prompts, metadata):
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise OSError("disk gone")
    return reward(pixels, prompts, metadata)


def train_until_it_fails(engine, folder):
    trainer = tiny_trainer(Path(folder), engine=engine, reward=only_on_rank_1)
    with pytest.raises(RewardError) as error:
        trainer.fit(progress=False)
    trainer.close()
    return str(error.value)


@pytest.mark.slow_suite  # starts two processes
def test_a_fault_on_one_rank_stops_all_with_a_checkpoint(tmp_path):
    said = ranks.run(tmp_path / "ranks", 2, train_until_it_fails, str(tmp_path / "run"))
    assert said[0] == said[1]
    assert said[0].startswith("rank 1: the reward only_on_rank_1 raised OSError: disk gone")
    assert "saved until there" in said[0]
    assert tiny_trainer(tmp_path / "run", resume=True).iteration == 0
