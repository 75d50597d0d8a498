"""Every public function with garbage: a refusal that names the argument, or a valid result."""

import functools
import warnings
from types import SimpleNamespace

import garbage
import pytest
import torch
from attempt import attempt
from hypothesis import given
from hypothesis import strategies as st
from tally import examples, tally

import guard_ops as go

SCHEDULE = go.SdeSchedule((0.9, 0.7, 0.5, 0.3), 0.7)
K, B = 3, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NAMES = ("v", "x", "y", "m", "old", "eps", "uncond", "ref")
LATENT = {name: normal(K, B, 5, seed=i) for i, name in enumerate(NAMES)}
ROWS = normal(K, B, seed=9) * 0.1
FORMS = {
    "mean": {"sample": LATENT["x"], "prev_sample": LATENT["y"], "old_mean": LATENT["m"]},
    "velocity": {
        "sample": LATENT["x"], "prev_sample": LATENT["y"], "old_model_output": LATENT["old"],
    },
    "noise": {"old_model_output": LATENT["old"], "noise": LATENT["eps"]},
    "seeded": {"old_model_output": LATENT["old"], "seed": go.philox_seed(3, (K, B))},
    "log-prob": {"sample": LATENT["x"], "prev_sample": LATENT["y"], "old_log_prob": ROWS},
}  # fmt: skip
COMMON = {"model_output": LATENT["v"], "coeffs": SCHEDULE[:]}
GUIDED = {"model_output_uncond": LATENT["uncond"], "guidance_scale": 2.0}
PLAIN_LOSS = COMMON | {"advantages": normal(B, seed=11), "config": go.GuardConfig.flow_grpo()}
FULL_LOSS = {
    "advantages": normal(K, B, seed=11),
    "config": go.GuardConfig.article(kl_beta=0.1),
    "ref_model_output": LATENT["ref"],
    "step_weights": ROWS.abs(),
    "statistics": go.RatioStatistics(K).update(ROWS),
}


def statistics():
    return go.RatioStatistics(K).update(ROWS)


def method(name):
    """Of fresh statistics, so that a call leaves no trace."""
    return lambda **arguments: getattr(statistics(), name)(**arguments)


def config(**fields):
    return go.GuardConfig(**fields)


def getitem(of, **arguments):
    return of()[arguments["k"]]


def switched(name):
    with go.use_backend(name):
        pass


BLOCK = {"log_ratio": ROWS, "config": go.GuardConfig("closed_form"), "coeffs": SCHEDULE[:]}
# What diffusers' flow-matching schedulers have after set_timesteps.
SCHEDULER = SimpleNamespace(
    sigmas=torch.tensor([0.9, 0.5, 0.0]),
    timesteps=torch.tensor([900.0, 500.0]),
    num_inference_steps=2,
    config=SimpleNamespace(num_train_timesteps=1000),
)
COEFFICIENTS = {name: getattr(SCHEDULE[:], name).clone() for name in ("a", "b", "s", "kappa", "dt")}
# What is called, with valid arguments; optional ones without a value here are None or left out.
CALLS = {
    **{
        f"guard_loss {form}": (go.guard_loss, PLAIN_LOSS | operands | {"process_group": None})
        for form, operands in FORMS.items()
    },
    "guard_loss full": (go.guard_loss, COMMON | FULL_LOSS | FORMS["noise"] | GUIDED),
    "guard_loss_and_grad": (go.guard_loss_and_grad, COMMON | FULL_LOSS | FORMS["mean"] | GUIDED),
    "log_ratio": (go.log_ratio, COMMON | FORMS["seeded"] | GUIDED | {"reduction": "sum"}),
    "log_prob": (
        go.log_prob,
        COMMON | {"sample": LATENT["x"], "prev_sample": LATENT["y"], "reduction": "mean"},
    ),
    "sde_step noise": (
        go.sde_step,
        COMMON | GUIDED | {"sample": LATENT["x"], "noise": LATENT["eps"], "reduction": "mean"},
    ),
    "sde_step seed": (
        go.sde_step, COMMON | {"sample": LATENT["x"], "seed": go.philox_seed(3, (K, B))},
    ),
    "sde_step generator": (
        go.sde_step, COMMON | {"sample": LATENT["x"], "generator": torch.Generator()},
    ),
    "ratio_norm": (go.ratio_norm, BLOCK | {"kl_old": ROWS.abs()}),
    "ratio_norm statistics": (
        go.ratio_norm,
        {"log_ratio": ROWS, "config": go.GuardConfig(), "statistics": statistics()},
    ),
    "balance_weights": (
        go.balance_weights,
        {"excess": ROWS, "config": go.GuardConfig(balance="inverse_dt"), "coeffs": SCHEDULE[:]},
    ),
    "clipped_surrogate": (
        go.clipped_surrogate,
        {"excess": ROWS, "advantages": normal(B), "config": go.GuardConfig()},
    ),
    "group_advantages": (
        go.group_advantages,
        {"rewards": normal(6), "groups": torch.arange(6) // 2, "scale": "group", "eps": 1e-4},
    ),
    "GuardConfig": (config, {
        "ratio_norm": "none", "target_std": 1.0, "std_floor": 1e-8, "detach_stats": True,
        "clip_low": 0.1, "clip_high": 0.1, "adv_clip": 5.0, "balance": "none",
        "weight_floor": 0.1, "reduction": "mean", "kl_beta": 0.0, "nonfinite": "drop",
    }),
    "SdeSchedule": (
        go.SdeSchedule,
        {"sigmas": (0.9, 0.5, 0.1), "noise_level": 0.7, "kind": "flow_sde", "device": "cpu"},
    ),
    "SdeSchedule tensor": (go.SdeSchedule, {"sigmas": torch.tensor([0.9, 0.5, 0.1])}),
    "SdeSchedule[k]": (functools.partial(getitem, lambda: SCHEDULE), {"k": torch.tensor([0, 1])}),
    "StepCoefficients": (go.StepCoefficients, COEFFICIENTS),
    "from_scheduler": (
        go.SdeSchedule.from_scheduler,
        {"scheduler": SCHEDULER, "noise_level": 0.7, "kind": "cps"},
    ),
    "philox_seed": (go.philox_seed, {"seed": 3, "shape": (2, 3), "device": "cpu"}),
    "RatioStatistics": (go.RatioStatistics, {"steps": 3, "device": "cpu"}),
    "RatioStatistics.update": (method("update"), {"log_ratio": ROWS}),
    "RatioStatistics.merge": (method("merge"), {"other": statistics()}),
    "RatioStatistics.decay": (method("decay"), {"factor": 0.5}),
    "RatioStatistics[k]": (functools.partial(getitem, statistics), {"k": 1}),
    "RatioStatistics.load_state_dict": (
        method("load_state_dict"), {"state": statistics().state_dict()},
    ),
    "use_backend": (switched, {"name": "reference"}),
}  # fmt: skip


@st.composite
def bad_calls(draw, call):
    """The arguments, of which one is garbage: its name, and what the garbage is called."""
    _, arguments = CALLS[call]
    name = draw(st.sampled_from(sorted(arguments)))
    kinds = ["never", "plain"]
    if isinstance(arguments[name], torch.Tensor):
        kinds += ["change", "change"]
    kind = draw(st.sampled_from(kinds))
    if kind == "change":
        label = draw(st.sampled_from(garbage.changes(arguments[name])))
        value = garbage.CHANGES[label](arguments[name])
    else:
        values = garbage.NEVER if kind == "never" else garbage.PLAIN
        label = draw(st.sampled_from(sorted(values)))
        value = values[label]
    return kind, name, label, arguments | {name: value}


def is_clear(refusal, arguments):
    """Whether it names an argument: the one that is garbage, or one that it does not fit."""
    text = str(refusal)
    named = (f"`{x}" in text or (len(x) > 4 and x in text) for x in arguments)
    return isinstance(refusal, (TypeError, ValueError)) and any(named)


@pytest.mark.parametrize("call", CALLS)
def test_garbage_is_refused_by_name_or_has_a_valid_result(call):
    function = CALLS[call][0]

    @examples(share=0.11 / len(CALLS))
    @given(drawn=bad_calls(call), backend=st.sampled_from(go.available_backends()))
    def search(drawn, backend):
        kind, name, label, arguments = drawn
        with go.use_backend(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, refusal = attempt(lambda: function(**arguments))
        if refusal is None:
            assert kind != "never", f"{name}={label} was accepted"
        else:
            said = f"{name}={label}: {type(refusal).__name__}: {refusal}"
            assert is_clear(refusal, arguments), said
        tally("garbage", backend)

    search()
