"""GuardConfig: the published recipes, and what it refuses."""

import dataclasses
import math

import pytest

import guard_ops as go

DEFAULTS = {
    "ratio_norm": "standardize",
    "target_std": 1.0,
    "std_floor": "auto",
    "detach_stats": True,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "adv_clip": 5.0,
    "balance": "none",
    "weight_floor": 0.1,
    "reduction": "mean",
    "kl_beta": 0.0,
    "nonfinite": "propagate",
}


def test_defaults():
    assert dataclasses.asdict(go.GuardConfig()) == DEFAULTS


@pytest.mark.parametrize(
    "recipe, changes",
    [
        ("article", {"balance": "inverse_ratio"}),
        (
            "paper",
            {
                "ratio_norm": "closed_form",
                "clip_low": 2e-6,
                "clip_high": 2e-6,
                "balance": "inverse_dt",
            },
        ),
        ("flow_grpo", {"ratio_norm": "none", "clip_low": 1e-4, "clip_high": 1e-4}),
        ("dance_grpo", {"ratio_norm": "none", "clip_low": 1e-4, "clip_high": 1e-4}),
    ],
)
def test_published_recipes(recipe, changes):
    make = getattr(go.GuardConfig, recipe)
    assert dataclasses.asdict(make()) == DEFAULTS | changes
    overridden = make(clip_high=0.3, nonfinite="drop")
    changes = changes | {"clip_high": 0.3, "nonfinite": "drop"}
    assert dataclasses.asdict(overridden) == DEFAULTS | changes


def test_it_is_a_value():
    assert go.GuardConfig.article() == go.GuardConfig.article()
    assert hash(go.GuardConfig.article()) == hash(go.GuardConfig.article())
    assert go.GuardConfig.article() != go.GuardConfig.paper()
    with pytest.raises(dataclasses.FrozenInstanceError):
        go.GuardConfig().clip_low = 0.1
    with pytest.raises(ValueError, match="`clip_low` is -1"):  # replace checks as well
        dataclasses.replace(go.GuardConfig(), clip_low=-1)


@pytest.mark.parametrize(
    "name, value, needs",
    [
        ("ratio_norm", "standardise", "one of none, standardize, closed_form"),
        ("ratio_norm", None, "one of none, standardize, closed_form"),
        ("balance", "inverse", "one of none, inverse_ratio, inverse_dt"),
        ("reduction", "avg", "one of mean, sum"),
        ("nonfinite", "ignore", "one of propagate, drop"),
    ],
)
def test_bad_choices(name, value, needs):
    with pytest.raises(ValueError, match=f"`{name}` is {value!r}; it needs {needs}"):
        go.GuardConfig(**{name: value})


@pytest.mark.parametrize(
    "name, value, needs",
    [
        ("target_std", 0, "> 0 and finite"),
        ("target_std", -1.0, "> 0 and finite"),
        ("target_std", math.inf, "> 0 and finite"),
        ("std_floor", -1e-9, ">= 0 and finite"),
        ("clip_low", -0.1, ">= 0"),
        ("clip_high", -0.1, ">= 0"),
        ("clip_high", math.nan, ">= 0"),
        ("adv_clip", 0, "> 0"),
        ("weight_floor", 0.0, "> 0 and finite"),
        ("weight_floor", math.inf, "> 0 and finite"),
        ("kl_beta", -0.1, ">= 0 and finite"),
        ("kl_beta", math.inf, ">= 0 and finite"),
    ],
)
def test_numbers_out_of_range(name, value, needs):
    with pytest.raises(ValueError, match=f"`{name}` is {value}; it needs {needs}$"):
        go.GuardConfig(**{name: value})


@pytest.mark.parametrize("name", [n for n, v in DEFAULTS.items() if isinstance(v, float)])
def test_numbers_of_another_type(name):
    for value in ("0.1", True, None, [0.1]):
        with pytest.raises(TypeError, match=f"`{name}` is .*; it needs a number"):
            go.GuardConfig(**{name: value})


def test_detach_stats_needs_a_bool():
    with pytest.raises(TypeError, match="`detach_stats` is 1 \\(int\\); it needs a bool"):
        go.GuardConfig(detach_stats=1)


def test_the_ends_of_the_ranges_are_allowed():
    config = go.GuardConfig(
        std_floor=0, clip_low=0, clip_high=math.inf, adv_clip=math.inf, kl_beta=0
    )
    assert config.clip_high == math.inf


def test_it_can_be_made_again_from_its_fields():
    config = go.GuardConfig.paper(kl_beta=0.1)
    assert go.GuardConfig(**vars(config)) == config
    assert vars(config) == dataclasses.asdict(config)


def test_an_int_that_no_float_can_represent_is_infinite():
    assert go.GuardConfig(clip_high=10**400).clip_high == math.inf
    with pytest.raises(ValueError, match=r"`kl_beta` is 1000.* it needs >= 0 and finite"):
        go.GuardConfig(kl_beta=10**400)
