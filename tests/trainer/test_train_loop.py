import json

import pytest
import torch
from tiny import CONFIG, TinyPolicy, reward, started, tiny_trainer

import guard_ops as go
from guard_ops.trainer import CheckpointError, FlowPolicy, checkpoint
from guard_ops.trainer.loop import _times
from guard_ops.trainer.metrics import read_metrics

GUARDS = {
    "article": go.GuardConfig.article(),
    "paper": go.GuardConfig.paper(),
    "flow_grpo": go.GuardConfig.flow_grpo(),
}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def numbers(path):
    """The lines of metrics.jsonl but for the clock."""
    return [{k: v for k, v in x.items() if k != "seconds"} for x in read_metrics(path)]


def newest(trainer):
    """Its newest checkpoint, as it is on the disk."""
    return checkpoint.newest(trainer.checkpoints, lambda saved: saved)[0]


def test_what_has_the_protocols_members_is_a_policy():
    assert isinstance(TinyPolicy(), FlowPolicy)
    assert not isinstance(torch.nn.Linear(1, 1), FlowPolicy)


@pytest.mark.parametrize("guard", GUARDS.values(), ids=GUARDS)
def test_the_reward_rises(tmp_path, guard):
    trainer = tiny_trainer(tmp_path, guard=guard, iterations=60, checkpoint_every=0, group_size=32)
    trainer.fit(progress=False)
    rewards = [line["reward"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    # the noise of a mean over 64 samples is 0.04
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3


@pytest.mark.parametrize("minibatches", [1, 2, 3])
def test_the_first_update_is_exactly_on_policy(tmp_path, minibatches):
    trainer = tiny_trainer(tmp_path, checkpoint_every=0, minibatches=minibatches, rollout_batch=5)
    loop, rollout, batches = started(trainer)
    advantages = torch.randn(16)
    *_, metrics = loop.update(rollout, advantages, batches[0], on_policy=True)
    assert torch.equal(metrics.ratio_bias, torch.zeros(3))
    assert torch.equal(metrics.ratio_std, torch.zeros(3))
    *_, metrics = loop.update(rollout, advantages, batches[0], on_policy=False)
    assert (metrics.ratio_std > 0).all()


def test_velocities_are_recomputed_in_the_shape_of_the_rollouts_calls(tmp_path):
    trainer = tiny_trainer(tmp_path, checkpoint_every=0, minibatches=3, rollout_batch=5)
    loop, rollout, batches = started(trainer)
    sizes, velocity = [], trainer.policy.velocity
    trainer.policy.velocity = lambda x, t, c: sizes.append(len(x)) or velocity(x, t, c)
    for batch in batches[:3]:
        again = loop.velocities(rollout, batch)
        # a row's place among the five may change the last bit
        torch.testing.assert_close(again, rollout.velocities[:3, batch.rows], rtol=1e-5, atol=1e-6)
    assert set(sizes) == {5}


def test_the_rollout_is_the_schedules_gaussian_with_the_seeds_noise(tmp_path):
    trainer = tiny_trainer(tmp_path, checkpoint_every=0)
    _, r, _ = started(trainer)
    for k, c in enumerate(r.draw.plan.rollout):
        zero = torch.zeros(16, 2, 3)
        noise = go.sde_step(zero, zero, c, seed=r.draw.seeds[k]).prev_sample
        expected = c.a * r.latents[k] + c.b * r.velocities[k] + noise
        torch.testing.assert_close(r.latents[k + 1].double(), expected.double(), rtol=0, atol=1e-6)
    first = r.latents[0]
    assert abs(first.mean()) < 0.3  # of 96 standard normals: 0.1
    assert abs(first.std() - 1) < 0.25


def test_advantages_compare_the_samples_of_one_prompt(tmp_path):
    """A reward that also depends on the prompt trains as if it did not."""
    seen = []
    for n, offset in enumerate((0.0, 64.0)):

        def shifted(pixels, prompts, metadata, offset=offset):
            shift = torch.tensor([offset * int(prompt) for prompt in prompts])
            return (pixels.flatten(1).mean(1) + shift).double()

        trainer = tiny_trainer(tmp_path / str(n), reward=shifted, iterations=3, checkpoint_every=0)
        trainer.fit(progress=False)
        seen.append(weights(trainer))
    for name in seen[0]:
        # float32 rewards near 128 carry 1e-5, which three updates of 1e-2 pass on
        torch.testing.assert_close(seen[0][name], seen[1][name], rtol=0, atol=1e-4)


def test_frozen_parameters_are_neither_trained_nor_saved(tmp_path):
    policy = TinyPolicy()
    before = policy.base.weight.clone()
    trainer = tiny_trainer(tmp_path, policy=policy)
    trainer.fit(progress=False)
    assert torch.equal(policy.base.weight, before)
    saved = newest(trainer).tensors
    assert set(saved["model"]) == set(saved["ema"]) == set(trainer.parameters)
    assert not any(name.startswith("base") for name in saved["model"])


def test_gradients_are_clipped_to_the_norm(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        max_grad_norm=1e-3,
        checkpoint_every=0,
    )
    before = weights(trainer)
    loop, rollout, batches = started(trainer)
    _, _, norm, _ = loop.update(rollout, torch.randn(16), batches[0], on_policy=True)
    moved = torch.cat([(p - before[n]).flatten() for n, p in trainer.parameters.items()])
    assert norm > 1e-3
    # float32 weights of 0.3 hold a step of 1e-3 to 3e-8 per element
    torch.testing.assert_close(moved.norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_resume_continues_to_the_same_bits(tmp_path):
    whole = tiny_trainer(tmp_path / "whole", evaluate=lambda: {"score": 1.0}, evaluate_every=2)
    whole.fit(progress=False)
    first = tiny_trainer(
        tmp_path / "parts", iterations=4, evaluate=lambda: {"score": 1.0}, evaluate_every=2
    )
    first.fit(progress=False)
    first.writer.write(5, {"reward": 0.0})  # what a run killed in iteration 6 leaves
    first.close()
    second = tiny_trainer(
        tmp_path / "parts", resume=True, evaluate=lambda: {"score": 1.0}, evaluate_every=2
    )
    assert second.iteration == 4
    second.fit(progress=False)
    assert_same_bits(weights(second), weights(whole))
    assert_same_bits(second.ema.average, whole.ema.average)
    files = [tmp_path / part / "metrics.jsonl" for part in ("whole", "parts")]
    assert numbers(files[0]) == numbers(files[1])
    assert [x["iteration"] for x in numbers(files[1])] == [1, 2, 3, 4, 5, 6]


def test_resume_from_an_older_checkpoint_after_damage_gives_the_same_bits(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.fit(progress=False)
    trainer.close()
    expected, lines = weights(trainer), numbers(tmp_path / "metrics.jsonl")
    path = trainer.checkpoints / "iteration-000006" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match=r"optimizer\.safetensors is truncated"):
        again = tiny_trainer(tmp_path, resume=True)
    assert again.iteration == 4
    again.fit(progress=False)
    assert_same_bits(weights(again), expected)
    assert numbers(tmp_path / "metrics.jsonl") == lines
    aside = trainer.checkpoints / "iteration-000006.corrupt" / "optimizer.safetensors"
    assert aside.stat().st_size == 100


def test_a_folder_with_checkpoints_is_not_started_over(tmp_path):
    tiny_trainer(tmp_path).fit(progress=False)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"`out` is .* which has checkpoints of another run"):
        tiny_trainer(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_with_only_damaged_checkpoints_changes_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path, iterations=2, keep_checkpoints=1)
    trainer.fit(progress=False)
    trainer.close()
    (trainer.checkpoints / "iteration-000002" / "state.json").write_text("{")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"state\.json is truncated"):
        tiny_trainer(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "`config.seed` is 1 but the run in `out` was trained with 0"),
        ({"guard": go.GuardConfig.paper()}, "`guard.ratio_norm` is 'closed_form' but the run in"),
        ({"policy": torch.nn.Module()}, "`policy` has no parameter"),
    ],
)
def test_resume_with_other_settings_is_refused_by_name(tmp_path, change, message):
    tiny_trainer(tmp_path).fit(progress=False)
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, resume=True, **change)


def test_resume_with_another_model_is_refused(tmp_path):
    tiny_trainer(tmp_path).fit(progress=False)
    policy = TinyPolicy()
    policy.prompt = torch.nn.Embedding(5, 6)
    with pytest.raises(ValueError, match=r"'prompt.weight' of shape \(5, 6\) .* \(3, 6\)"):
        tiny_trainer(tmp_path, resume=True, policy=policy)


def test_a_loss_that_is_not_finite_stops_before_a_checkpoint(tmp_path):
    policy = TinyPolicy()
    policy.base.weight.data.fill_(float("nan"))
    trainer = tiny_trainer(
        tmp_path, policy=policy, reward=lambda pixels, *_: torch.arange(float(len(pixels)))
    )
    with pytest.raises(FloatingPointError, match="the loss is nan in iteration 1"):
        trainer.fit(progress=False)
    assert newest(trainer).iteration == 0


def test_dropping_what_is_not_finite_trains_on_the_rest(tmp_path):
    def sometimes(*given):
        return reward(*given).index_fill(0, torch.tensor([0]), float("nan"))

    guard = go.GuardConfig.article(nonfinite="drop")
    trainer = tiny_trainer(tmp_path, reward=sometimes, guard=guard)
    before = weights(trainer)
    trainer.fit(progress=False)
    for name, p in trainer.parameters.items():
        assert p.isfinite().all()
        assert not torch.equal(p, before[name])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text.splitlines()[0])["reward"] is None  # JSON has no NaN


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": ["0"]}, "`prompts` has 1 texts; `prompts_per_iteration` 2 needs"),
        ({"prompts": "012"}, "`prompts` needs to be a sequence of texts"),
        ({"metadata": [{}]}, "`metadata` has 1 entries for 3 `prompts`"),
        ({"noise_level": 0.0}, "step 0 is to be trained but has no noise"),
        ({"noise_level": [0.7, 0.7]}, "`noise_level` has 2 values; it needs one, or 4"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_trainer(tmp_path, **changes)


def test_tensorboard_gets_every_number(tmp_path):
    trainer = tiny_trainer(tmp_path, tensorboard=True, iterations=2)
    trainer.fit(progress=False)
    trainer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    line = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert [e.step for e in events.Scalars("reward")] == [1, 2]
    # event files hold float32
    assert events.Scalars("reward")[-1].value == pytest.approx(line["reward"], rel=1e-6)
    last = events.Scalars("ratio_std/step_2")[-1].value
    assert last == pytest.approx(line["ratio_std"][2], rel=1e-6)


def test_defaults_of_the_tiny_job_cover_every_row_once_an_epoch():
    assert CONFIG.prompts_per_iteration * CONFIG.group_size % CONFIG.minibatches == 0


@pytest.mark.parametrize("update", [1, 4])
def test_a_gradient_that_is_not_finite_stops_the_run_before_a_checkpoint(tmp_path, update):
    """The loss is finite throughout; of 2 epochs of 2 updates the first epoch is in no metric."""
    trainer = tiny_trainer(tmp_path, iterations=4, checkpoint_every=1)
    trainer.iterate()
    backward, count = trainer.engine.backward, [0]

    def broken(velocity, gradient, *, last=True):
        count[0] += last
        backward(velocity, gradient * (torch.inf if count[0] == update else 1), last=last)

    trainer.engine.backward = broken
    with pytest.raises(
        FloatingPointError,
        match=f"norm of the gradient is (nan|inf) in update {update} of 4 in iteration 2; that",
    ):
        trainer.fit(progress=False)
    assert newest(trainer).iteration == 0
    assert all(p.isfinite().all() for p in trainer.parameters.values())
    assert all(p.isfinite().all() for p in trainer.ema.average.values())
    trainer.close()
    assert tiny_trainer(tmp_path, resume=True, iterations=4, checkpoint_every=1).iteration == 0


def test_a_ranks_weight_is_not_rounded_to_the_gradients_dtype():
    """Of 5 of 9 samples on one of two ranks: 10 / 9, which bfloat16 has as 1.1094."""
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.tensor(10 / 9, dtype=torch.float64)
    scaled = _times(gradient, weight)
    assert scaled.dtype == torch.bfloat16
    # one rounding to 8 bits, of a product off by at most a float32's rounding
    exact = gradient.double() * weight
    assert ((scaled.double() - exact).abs() <= exact.abs() * (2**-8 + 2**-22)).all()
    assert not torch.equal(scaled, gradient * weight.bfloat16())
