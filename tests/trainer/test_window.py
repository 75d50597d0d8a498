"""Which steps are stochastic and trained, and what is drawn."""

import pytest
import torch
from tiny import started, tiny_trainer

from guard_ops.trainer import Window, draws


def steps(window, n=10, samples=6, iteration=0, seed=0):
    return window.draw(n, samples, seed, iteration)


def test_all_but_the_last_step_is_the_default():
    assert steps(Window()) == [list(range(9))]
    assert steps(Window(last=None)) == [list(range(10))]


def test_a_subset_is_random_sorted_and_of_the_range():
    seen = [steps(Window("subset", 3, first=1, last=6), iteration=i)[0] for i in range(30)]
    assert all(row == sorted(set(row)) and len(row) == 3 for row in seen)
    assert {k for row in seen for k in row} == {1, 2, 3, 4, 5}
    assert len({tuple(row) for row in seen}) > 5


def test_each_sample_may_have_a_subset_of_its_own():
    rows = steps(Window("subset_per_sample", 6))
    assert len(rows) == 6
    assert len({tuple(row) for row in rows}) > 1


def test_a_random_window_is_in_a_row_anywhere_in_the_range():
    seen = {tuple(steps(Window("random_window", 3, last=5), iteration=i)[0]) for i in range(40)}
    assert seen == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}


def test_a_sliding_window_moves_on_and_begins_again():
    window = Window("sliding_window", 2, last=4, every=3)
    starts = [steps(window, iteration=i)[0][0] for i in range(12)]
    assert starts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0]


def test_outside_a_window_the_ode_is_sampled(tmp_path):
    window = Window("sliding_window", 2, first=1, last=3, outside="ode")
    trainer = tiny_trainer(tmp_path, checkpoint_every=0, window=window)
    _, r, _ = started(trainer)
    sigmas = trainer.policy.schedule(4).sigmas
    for k in (0, 3):
        euler = r.latents[k] + (sigmas[k + 1] - sigmas[k]) * r.velocities[k]
        torch.testing.assert_close(r.latents[k + 1], euler, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(r.latents[2], r.latents[1] - 0.3 * r.velocities[1], atol=1e-2)
    trainer.iterate()


def test_branches_of_a_group_part_at_the_first_trained_step(tmp_path):
    window = Window("sliding_window", 1, first=2, last=3, branch=True)
    trainer = tiny_trainer(tmp_path, checkpoint_every=0, window=window)
    _, r, _ = started(trainer)
    for group in r.draw.groups.unique():
        mine = r.latents[:, r.draw.groups == group]
        for k in range(3):
            torch.testing.assert_close(mine[k], mine[k, :1].expand_as(mine[k]))
        assert (mine[3] - mine[3, :1])[1:].abs().amax((1, 2)).min() > 1e-3


def test_noise_level_and_kind_may_differ_between_steps(tmp_path):
    changes = {"noise_level": [0.1, 0.3, 0.5, 0.7], "sde": ["flow_sde", "dance_sde"] * 2}
    trainer = tiny_trainer(tmp_path, checkpoint_every=0, **changes)
    s = [float(step.s) for step in trainer.loop.noise.steps]
    assert s[1] == pytest.approx(0.3 * 0.3**0.5)
    assert s[3] == pytest.approx(0.7 * 0.2**0.5)
    trainer.iterate()
    with pytest.raises(ValueError, match="mixes cps with other kinds"):
        tiny_trainer(tmp_path / "b", checkpoint_every=0, sde=["cps", "flow_sde", "cps", "cps"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "some"}, "`kind` is 'some'; it needs one of all, subset"),
        ({"size": 0}, "`size` is 0; it needs an int >= 1"),
        ({"outside": "ode", "kind": "subset_per_sample"}, "`outside` is 'ode' with `kind`"),
    ],
)
def test_a_window_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Window(**arguments)


def test_a_window_without_a_trainable_step_is_refused():
    with pytest.raises(ValueError, match="`window` leaves none of the 4 steps to train"):
        Window(first=4).steps(4)
    with pytest.raises(ValueError, match=r"`window.size` is 5, more than the 3 steps"):
        Window(size=5).steps(4)


@pytest.mark.parametrize("samples, minibatches, ranks", [(14, 1, 4), (9, 2, 4), (10, 3, 3)])
def test_ranks_share_samples_evenly_and_each_has_a_part_of_every_minibatch(
    samples, minibatches, ranks
):
    shares = draws.shares(samples, minibatches, ranks)
    assert [i for s in shares for i in range(s.first, s.last)] == list(range(samples))
    for epoch in range(5):
        of = draws.minibatch_of(samples, minibatches, 0, 0, epoch)
        counts = torch.stack([of[s.first : s.last].bincount(minlength=minibatches) for s in shares])
        assert counts.min() >= 1
        assert (counts.amax(0) - counts.amin(0)).max() <= 1


def test_too_many_ranks_are_refused():
    with pytest.raises(ValueError, match="is 7 samples; 4 ranks with `minibatches` 2 need at"):
        draws.shares(7, 2, 4)


def test_draws_depend_on_seed_iteration_and_purpose_alone(tmp_path):
    keys = {draws.key(s, i, w) for s in range(3) for i in range(3) for w in ("noise", "prompts")}
    assert len(keys) == 18
    whole = draws.seeds(4, 10, draws.Share(0, 10), 1, 2, torch.device("cpu"))
    part = draws.seeds(4, 10, draws.Share(3, 7), 1, 2, torch.device("cpu"))
    assert torch.equal(whole[:, 3:7], part)
    normals = draws.normals(whole[-1], (500,), torch.float32, draws.only_noise(part.device))
    assert abs(normals.mean()) < 0.06  # of 5,000: 0.014
    assert abs(normals.std() - 1) < 0.04
