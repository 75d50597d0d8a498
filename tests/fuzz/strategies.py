"""What hypothesis draws: the structure of a call. Its numbers follow from a drawn seed (build.py).

Structure is what shrinks well; numbers element by element would not, and would take a thousand
draws a case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

import guard_ops as go

FORMS = {
    "mean": ("sample", "prev_sample", "old_mean"),
    "velocity": ("sample", "prev_sample", "old_model_output"),
    "noise": ("old_model_output", "noise"),
    "seeded": ("old_model_output", "seed"),
    "log-prob": ("sample", "prev_sample", "old_log_prob"),
}
KINDS = ("flow_sde", "dance_sde", "wan_sde", "cps")
NARROW = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (torch.float64, *NARROW)
LAYOUTS = ("plain", "transposed", "sliced", "offset", "spread", "channels_last")
BAD = (math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Case:
    """A call's structure; ``build.arguments`` makes its tensors."""

    form: str
    kind: str
    one_step: bool
    steps: int
    batch: int
    latent: tuple[int, ...]
    sigmas: tuple[float, ...]
    noise_level: float
    per_transition: bool  # coefficients [K, B]
    dtypes: dict[str, torch.dtype]  # by operand; the others are float32, or all float64
    layouts: dict[str, str]  # by operand; the others are plain
    drift: float  # of the mean, in units of s; 0 is on policy bit for bit
    reach: float  # a log-ratio that some transitions get
    magnitude: float  # of latents
    shared: str | None  # an operand that is one sample's, expanded over the batch
    guidance_scale: float | None
    seed: int
    poisons: tuple[tuple[str, int, int, int, float], ...] = ()  # operand, step, sample, element


@st.composite
def schedules(draw: st.DrawFn, kind: str) -> tuple[tuple[float, ...], float]:
    """Sigmas and a noise level all of whose steps are stochastic."""
    last = draw(st.sampled_from((0.0, 0.05, 0.2))) if kind != "cps" else 0.1
    first = draw(st.sampled_from((1.0, 0.95, 0.7)))
    inner = draw(st.lists(st.integers(1, 63), min_size=1, max_size=4, unique=True))
    middle = [last + (first - last) * k / 64 for k in sorted(inner, reverse=True)]
    return (first, *middle, last), draw(st.sampled_from((0.7, 1.0, 0.1, 0.01)))


LATENTS = (
    (1,), (2,), (3,), (7,), (8,), (16,), (31,), (64,), (65,), (130,),
    (2, 3), (4, 5, 3), (1, 1, 9), (257,), (2100,),
)  # fmt: skip


@st.composite
def cases(
    draw: st.DrawFn,
    poisoned: bool = True,
    forms: tuple[str, ...] = tuple(FORMS),
    guided: bool = True,
) -> Case:
    form, kind = draw(st.sampled_from(forms)), draw(st.sampled_from(KINDS))
    one_step = draw(st.booleans())
    steps = 1 if one_step else draw(st.sampled_from((3, 1, 2, 5)))
    batch = draw(st.sampled_from((4, 1, 2, 3, 7, 33)))
    latent = draw(st.sampled_from(LATENTS if batch * steps <= 40 else LATENTS[:13]))
    sigmas, noise_level = draw(schedules(kind))
    operands = ["model_output", *(n for n in FORMS[form] if n not in ("seed", "old_log_prob"))]
    scales = (None, None, None, 2.5, 1.0, 7.0, 0.0, -1.5) if guided else (None,)
    guidance_scale = draw(st.sampled_from(scales))
    operands += ["ref_model_output"] + ["model_output_uncond"] * (guidance_scale is not None)
    drift = draw(st.sampled_from((0.1, 0.0, 1e-6, 1e-3, 1.0)))
    if draw(st.booleans()):
        of_one = draw(st.sampled_from(DTYPES))
        dtypes = dict.fromkeys(operands, of_one)
        if form == "mean" and of_one != torch.float64 and draw(st.booleans()):
            dtypes["old_mean"] = torch.float32
    else:
        dtypes = {name: draw(st.sampled_from(NARROW)) for name in operands}
    if draw(st.booleans()):
        layouts = {name: draw(st.sampled_from(LAYOUTS)) for name in operands}
    else:
        layouts = {}
    magnitude, reach = 1.0, 0.0
    if draw(st.integers(0, 3)) == 3:
        reach = draw(st.sampled_from((5.0, 30.0, 60.0, 95.0, 200.0, 355.0, 600.0)))
    elif torch.float16 not in dtypes.values():
        magnitude = draw(st.sampled_from((1.0, 1.0, 1.0, 1e-3, 1e3, 1e-9, 1e9)))
    poisons: list[tuple[str, int, int, int, float]] = []
    if poisoned and draw(st.integers(0, 2)) == 0:
        names = [*operands, "advantages", "step_weights", "statistics"]
        names += ["old_log_prob"] * (form == "log-prob")
        for _ in range(draw(st.integers(1, 2))):
            where = [draw(st.integers(0, 2**20)) for _ in range(3)]
            poisons.append((draw(st.sampled_from(names)), *where, draw(st.sampled_from(BAD))))
    return Case(
        form=form,
        kind=kind,
        one_step=one_step,
        steps=steps,
        batch=batch,
        latent=latent,
        sigmas=sigmas,
        noise_level=noise_level,
        per_transition=not one_step and draw(st.integers(0, 3)) == 3,
        dtypes=dtypes,
        layouts=layouts,
        drift=drift,
        reach=reach,
        magnitude=magnitude,
        shared=draw(st.sampled_from((None, None, None, "sample", "noise"))),
        guidance_scale=guidance_scale,
        poisons=tuple(poisons),
        seed=draw(st.integers(0, 2**32)),
    )


def configs(case: Case) -> st.SearchStrategy[go.GuardConfig]:
    """Configs that the case can be called with."""
    norms = ["standardize", "none"]
    if case.kind != "cps" and case.form != "log-prob":
        norms.append("closed_form")
    clips = (0.2, 1e-4, 2e-6, 0.0, math.inf)
    return st.builds(
        go.GuardConfig,
        ratio_norm=st.sampled_from(norms),
        target_std=st.sampled_from((1.0, 0.3)),
        std_floor=st.sampled_from(("auto", 1e-8, 0.0, 1e-3)),
        detach_stats=st.booleans(),
        clip_low=st.sampled_from(clips),
        clip_high=st.sampled_from(clips),
        adv_clip=st.sampled_from((5.0, 0.5, math.inf)),
        balance=st.sampled_from(("none", "inverse_ratio", "inverse_dt")),
        weight_floor=st.sampled_from((0.1, 0.9)),
        reduction=st.sampled_from(("mean", "sum")),
        kl_beta=st.sampled_from((0.0, 0.0, 0.04)),
        nonfinite=st.sampled_from(("propagate", "drop")),
    )


@st.composite
def losses(draw: st.DrawFn, poisoned: bool = True) -> tuple[Case, go.GuardConfig, dict[str, Any]]:
    """A case, its config, and which of the objective's other operands it has."""
    case = draw(cases(poisoned))
    config = draw(configs(case))
    options = {
        "advantages": draw(st.sampled_from(("sample", "transition", "zero", "large"))),
        "advantages_dtype": draw(st.sampled_from((torch.float32, *DTYPES))),
        "step_weights": draw(st.integers(0, 4)) == 4,
        "statistics": config.ratio_norm == "standardize"
        and config.detach_stats
        and draw(st.integers(0, 3)) == 3,
        "factor": draw(st.sampled_from((1.0, 1024.0, 0.5, -3.0))),
    }
    if config.balance == "inverse_ratio" and case.steps == 1:  # which needs step_weights
        options["step_weights"] = True
    return case, config, options
