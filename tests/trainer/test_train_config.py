import re

import pytest

from guard_ops.trainer import TrainConfig


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("iterations", 0, "`iterations` is 0; it needs >= 1"),
        ("iterations", 2.0, "`iterations` is 2.0; it needs an int"),
        ("iterations", True, "`iterations` is True; it needs an int"),
        ("group_size", 1, "`group_size` is 1; it needs >= 2"),
        ("inner_epochs", 0, "`inner_epochs` is 0; it needs >= 1"),
        ("minibatches", 161, "`minibatches` is 161 for the 160 samples of a rollout"),
        ("learning_rate", 0, "`learning_rate` is 0; it needs > 0"),
        ("learning_rate", float("nan"), "`learning_rate` is nan; it needs > 0"),
        ("learning_rate", float("inf"), "`learning_rate` is inf; it needs >= 0 and finite"),
        ("learning_rate", "1e-3", "`learning_rate` is '1e-3'; it needs a number"),
        ("weight_decay", -0.1, "`weight_decay` is -0.1; it needs >= 0 and finite"),
        ("max_grad_norm", -1.0, "`max_grad_norm` is -1.0; it needs > 0"),
        ("ema_decay", 1.0, "`ema_decay` is 1.0; it needs 0 <= ema_decay < 1"),
        ("steps", 1, "`window` leaves none of the 1 steps to train"),
        ("micro_batch", 0, "`micro_batch` is 0; it needs >= 1"),
        ("rollout_batch", 0.5, "`rollout_batch` is 0.5; it needs an int"),
        ("advantage_scale", "prompt", "`advantage_scale` is 'prompt'; it needs one of group, "),
        ("seed", -1, "`seed` is -1; it needs >= 0"),
        ("seed", 2**63, f"`seed` is {2**63}; it needs < 2**63"),
        ("checkpoint_every", -1, "`checkpoint_every` is -1; it needs >= 0"),
        ("keep_checkpoints", 0, "`keep_checkpoints` is 0; it needs >= 1"),
        ("tensorboard", 1, "`tensorboard` is 1; it needs a bool"),
    ],
)
def test_error_names_the_argument(name, value, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        TrainConfig(**{name: value})


def test_the_default_is_valid_and_frozen():
    config = TrainConfig()
    assert config.max_grad_norm == 1.0
    with pytest.raises(AttributeError):
        config.seed = 1
