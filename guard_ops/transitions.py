"""The operands of a call: the named groups that backends take, and the checks that fill them.

A new operand over latents is a field of :class:`Latents` and one of ``options.TransitionOptions``;
docs/life-of-a-call.md says what else reads the list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import inference, masks
from .checks import (
    FLOATING,
    OWNERS,
    check_choice,
    check_dense,
    check_device,
    check_floating,
    check_number,
    describe,
    is_functorch,
)
from .config import GuardConfig
from .options import Names
from .schedule import StepCoefficients

Given = Mapping[str, Any]  # a call's keyword arguments: those of TransitionOptions and maybe more

FORMS = {
    "mean": ("sample", "prev_sample", "old_mean"),
    "velocity": ("sample", "prev_sample", "old_model_output"),
    "noise": ("old_model_output", "noise"),
    "seeded": ("old_model_output", "seed"),
    "log-prob": ("sample", "prev_sample", "old_log_prob"),
}
DIFFERENTIATED = ("model_output", "model_output_uncond")
LARGEST_SCALE = torch.finfo(torch.float32).max

# ---- the groups ---------------------------------------------------------------------------------


class Latents(NamedTuple):
    """The operands over whole latents, [K, B, D] with dense D; strides over K and B are free.

    The form in which the behaviour policy is given (:data:`FORMS`) follows from which of the
    optional ones are there. csrc/transition.h lists the same names, which backends/compiled.py
    compares.
    """

    model_output: Tensor  # v
    model_output_uncond: Tensor | None  # v = uncond + guidance_scale (v - uncond)
    ref_model_output: Tensor | None
    sample: Tensor | None  # x
    prev_sample: Tensor | None  # y
    old_mean: Tensor | None  # m
    old_model_output: Tensor | None
    noise: Tensor | None
    mask: Tensor | None  # bool: which elements count

    def velocities(self) -> list[Tensor]:
        """The policy's velocities, old and new, that the call has."""
        of = (self.model_output, self.model_output_uncond, self.old_model_output)
        return [x for x in of if x is not None]

    def present(self) -> list[Tensor]:
        """The operands that the call has."""
        return [x for x in self if x is not None]


# Those that a rollout's step may have, in csrc/bindings.h's order.
STEP_LATENTS = ("model_output", "model_output_uncond", "sample", "noise", "mask")


class Transitions(NamedTuple):
    """K x B transitions: all that a kernel over latents has to know.

    The groups of operands have methods but no properties, because torch.compile of torch 2.9
    compares a named tuple's property without asking for its value.
    """

    latents: Latents
    seed: Tensor | None  # [K, B, 2 or 3] int64: Philox key, transition; of a shard its counter
    coefficients: Tensor  # [5, K, B] float64: a, b, s, kappa, dt
    guidance_scale: float

    def form(self) -> str:
        """How the behaviour policy is given: a key of :data:`FORMS`."""
        if self.seed is not None:
            return "seeded"
        if self.latents.noise is not None:
            return "noise"
        if self.latents.old_model_output is not None:
            return "velocity"
        return "log-prob" if self.latents.old_mean is None else "mean"

    def compute_dtype(self) -> torch.dtype:
        """float64 if any operand is, else float32."""
        return compute_dtype(*self.latents.present())

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors in one flat tuple, because an autograd.Function does not look into groups."""
        return (*self.latents, self.seed, self.coefficients)

    def given(self) -> list[Tensor]:
        """Those of :meth:`tensors` that the call has."""
        return [x for x in self.tensors() if x is not None]

    @classmethod
    def take(cls, tensors: Iterator[Any], guidance_scale: float) -> Transitions:
        """Rebuilds the group from what :meth:`tensors` gave; leaves any tensors that follow."""
        latents = Latents._make([next(tensors) for _ in Latents._fields])
        return cls(latents, next(tensors), next(tensors), guidance_scale)


class Rows(NamedTuple):
    """The numbers of an objective that come with each transition or step."""

    advantages: Tensor  # [K, B] float64 or float32
    old_log_prob: Tensor | None  # [K, B] float64 or float32
    step_weights: Tensor | None  # [K, B] float64 or float32
    elements: Tensor | None  # [K, B] float64: D of each transition; None if it is the latent's size
    statistics: Tensor | None  # [3, K] float64: mean, std and std_floor of each step


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: what the arithmetic runs in."""
    wide = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


@inference.lasting
def philox_seed(
    seed: int, shape: tuple[int, ...], device: torch.device | str | None = None
) -> Tensor:
    """Seeds of a rollout's noise: a tensor to store and slice like the rest of the trajectory.

    The noise of element e of a transition is Philox4x32-10 with key ``seed`` and counter
    ``(e / 4, transition)``; the transitions of ``shape`` are numbered 0, 1, 2, ... in its order.
    ``sde_step(..., seed=seeds[k])`` draws with it; ``guard_loss(..., seed=seeds)`` regenerates it,
    whatever micro-batch or permutation of the samples it is given.

    Args:
        seed: 0 <= seed < 2**63. Use another one for every rollout and rank.
        shape: ``(K, B)`` or ``(B,)``.

    Returns:
        int64 ``[*shape, 2]``: key and transition number.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"`seed` is {seed!r} ({type(seed).__name__}); it needs an int")
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` is {seed}; it needs 0 <= seed < 2**63")
    sizes = isinstance(shape, (tuple, list)) and all(
        isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape
    )
    if not sizes or len(shape) not in (1, 2):
        raise ValueError(f"`shape` is {shape!r}; it needs (K, B) or (B,), positive ints")
    device, count = check_device("device", device), math.prod(shape)
    transition = torch.arange(count, device=device).reshape(shape)
    return torch.stack([torch.full_like(transition, seed), transition], -1)


# ---- the checks ---------------------------------------------------------------------------------


def check_options(function: str, given: Given, names: Names) -> None:
    """Raises for an unknown or missing keyword argument, as Python does for a plain signature."""
    for name in given:
        if name not in names.known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    for name in names.required:
        if name not in given:
            raise TypeError(f"{function}() is missing the keyword argument {name!r}")


class CallShape(NamedTuple):
    """How the caller shaped a call: ``[K, B, *latent]``, or ``[B, *latent]`` for one step."""

    steps: int
    batch: int
    full: tuple[int, ...]  # the shape of an operand over latents
    one_step: bool

    def leading(self) -> tuple[int, ...]:
        """``(B,)`` or ``(K, B)``."""
        return (self.batch,) if self.one_step else (self.steps, self.batch)


def check_shape(model_output: Tensor, coeffs: StepCoefficients) -> CallShape:
    """The call's shape from ``model_output`` and ``coeffs``; raises naming what does not fit."""
    check_tensor("model_output", model_output)
    check_coefficients(coeffs)
    shape, one_step = tuple(model_output.shape), coeffs.table.ndim == 1
    leading = 1 if one_step else 2
    if len(shape) <= leading:
        raise ValueError(
            f"`model_output` has shape {shape}; with `coeffs` of shape {tuple(coeffs.shape)} it "
            f"needs {'[B, *latent]' if one_step else '[K, B, *latent]'}"
        )
    if 0 in shape:
        raise ValueError(f"`model_output` has shape {shape}, which is empty")
    if coeffs.table.device != model_output.device:
        raise ValueError(
            f"`coeffs` is on {coeffs.table.device} but `model_output` on {model_output.device}; "
            "use schedule.to(device) once"
        )
    got = tuple(coeffs.table.shape[1:])
    want = shape[: len(got)]
    if got != want:
        raise ValueError(f"`coeffs` has shape {got} but `model_output` {shape} needs {want}")
    steps = 1 if one_step else shape[0]
    return CallShape(steps, shape[leading - 1], shape, one_step)


def full_table(coeffs: StepCoefficients, shape: CallShape, model_output: Tensor) -> Tensor:
    """The coefficients, which a call takes as [], [K] or [K, B], as one table [5, K, B]."""
    table: Tensor = normal(coeffs.table)
    mode = getattr(model_output, "fake_mode", None)  # of FakeTensorMode, which mixes no tensors
    if mode is not None and type(table) is Tensor and not torch.compiler.is_compiling():
        table = mode.from_tensor(table)
    table = table.reshape(table.shape + (1,) * (3 - table.ndim))
    return table.expand(5, shape.steps, shape.batch)


def check_stochastic(coeffs: StepCoefficients) -> None:
    """Raises for a deterministic step, which has no density and so no ratio."""
    if coeffs.deterministic:
        raise ValueError(
            f"`coeffs` has s == 0 at step {', '.join(map(str, coeffs.deterministic))} of this call:"
            " a deterministic step (an ODE tail, or the last step of cps) has no density; leave it"
            " out"
        )


def latents(name: str, value: Tensor, shape: CallShape, device: torch.device) -> Tensor:
    """Checks an operand and views it as [K, B, D]; copies it only if its latents are not dense."""
    check_tensor(name, value)
    if value.shape != shape.full:
        raise ValueError(f"`{name}` has shape {tuple(value.shape)} but `model_output` {shape.full}")
    if value.device != device:
        raise ValueError(f"`{name}` is on {value.device} but `model_output` on {device}")
    return flatten(value, shape.steps, shape.batch)


def flatten(value: Tensor, steps: int, batch: int) -> Tensor:
    """``value`` as [K, B, D] with dense D; a view if its latents are dense."""
    value = value.reshape(steps, batch, -1)
    return value if value.stride(2) == 1 or value.shape[2] == 1 else value.contiguous()


def normal(value: Tensor) -> Tensor:
    """[K, B] numbers of which autograd may keep some: a copy if they were made in inference mode.

    Latents need none, as nothing but our own Functions keeps them.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return value  # nothing is recorded in inference mode
    return value.clone() if value.is_inference() else value


def check_constant(name: str, value: Tensor) -> None:
    """Raises for a constant that requires grad, because its gradient would be ignored."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"`{name}` requires grad but is a constant of the loss; detach it")


def per_transition(
    name: str,
    value: Tensor | None,
    shape: CallShape,
    device: torch.device,
    *,
    per_sample: bool = False,
) -> Tensor:
    """Checks a number per transition and returns it as [K, B] float64 or float32.

    ``value`` is [K, B], or [B] for one step; with ``per_sample`` it may be [B] for several steps.
    16-bit numbers become float32, which represents them exactly.
    """
    value = check_tensor(name, value)
    check_constant(name, value)
    # Ranks first: a traced comparison of [B] with (K, B) would hold only for batches other than K.
    ok = value.ndim == len(shape.leading()) and tuple(value.shape) == shape.leading()
    if per_sample and value.ndim == 1 and tuple(value.shape) == (shape.batch,):
        ok, value = True, value.expand(shape.steps, shape.batch)
    if not ok:
        choices = {shape.leading(), (shape.batch,)} if per_sample else {shape.leading()}
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)}; with `model_output` of shape {shape.full} "
            f"it needs {' or '.join(map(str, sorted(choices, key=len)))}"
        )
    if value.device != device:
        raise ValueError(f"`{name}` is on {value.device} but `model_output` on {device}")
    value = normal(value).reshape(shape.steps, shape.batch)
    return value if value.element_size() > 2 else value.float()


def seeds(seed: Tensor, shape: CallShape, device: torch.device, offset: int) -> Tensor:
    """[K, B, 2] int64 from what the caller passed as ``seed``.

    Where the latents are a shard whose first element is number ``offset`` of the whole latent, the
    counter of its noise is a third number, [K, B, 3].
    """
    if not isinstance(seed, Tensor):
        why = ": an int would give every step the same noise" if isinstance(seed, int) else ""
        raise TypeError(
            f"`seed` is {describe(seed)}; it needs the rollout's seeds, philox_seed(seed, (K, B)), "
            f"or its part [k] for one step{why}"
        )
    if seed.dtype != torch.int64:
        raise TypeError(f"`seed` has dtype {seed.dtype}; it needs torch.int64, as philox_seed's")
    if not torch.compiler.is_compiling():
        check_plain("seed", seed)
    if tuple(seed.shape) != (*shape.leading(), 2):
        raise ValueError(
            f"`seed` has shape {tuple(seed.shape)} but `model_output` {shape.full} needs "
            f"{(*shape.leading(), 2)}"
        )
    if seed.device != device:
        raise ValueError(f"`seed` is on {seed.device} but `model_output` on {device}")
    seed = seed.reshape(shape.steps, shape.batch, 2)
    return torch.cat([seed, torch.full_like(seed[..., :1], offset // 4)], -1) if offset else seed


def check_offset(offset: Any, seed: object) -> int:
    """``latent_offset``; raises unless it is a place at which a Philox counter begins."""
    if offset is None:
        return 0
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"`latent_offset` is {describe(offset)}; it needs an int")
    if not 0 <= offset < 2**63 or offset % 4:
        raise ValueError(
            f"`latent_offset` is {offset}; it needs a multiple of 4 that is not negative, as each "
            "counter of the noise makes 4 elements"
        )
    if seed is None:
        raise ValueError("`latent_offset` is given without `seed`, to whose noise alone it applies")
    return offset


_BEHAVIOUR = tuple(sorted({name for names in FORMS.values() for name in names}))
_FORM_OF = {tuple(sorted(names)): form for form, names in FORMS.items()}


def check_form(given: Given) -> str:
    """The one form that the given operands make; raises for none, half of one, or two at once."""
    present = tuple([name for name in _BEHAVIOUR if given.get(name) is not None])
    form = _FORM_OF.get(present)
    if form is None:
        options = "; ".join(f"{name}: {' + '.join(parts)}" for name, parts in FORMS.items())
        raise ValueError(
            f"the behaviour policy is given by {' + '.join(present) or 'nothing'}; it "
            f"needs exactly one of the forms  {options}"
        )
    return form


def check_guidance(given: Given) -> float:
    """The guidance scale, 1 for a call without classifier-free guidance."""
    uncond, scale = given.get("model_output_uncond"), given.get("guidance_scale")
    if (uncond is None) != (scale is None):
        missing = "guidance_scale" if scale is None else "model_output_uncond"
        raise ValueError(f"`{missing}` is missing: classifier-free guidance needs both")
    if scale is None:
        return 1.0
    if not abs(check_number("guidance_scale", scale)) <= LARGEST_SCALE:
        raise ValueError(
            f"`guidance_scale` is {scale}; it needs a number that float32 represents, at most "
            f"{LARGEST_SCALE:.3g}"
        )
    return float(scale)


def gather(shape: CallShape, model_output: Tensor, given: Given) -> Transitions:
    """Checks every operand over latents and flattens it to [K, B, D]."""
    coeffs: StepCoefficients = given["coeffs"]
    check_stochastic(coeffs)
    check_form(given)
    scale = check_guidance(given)
    device = model_output.device
    found = []
    for name in Latents._fields:
        value = model_output if name == "model_output" else given.get(name)
        if value is not None and name == "mask":
            value = masks.flat(value, shape, device)
        elif value is not None:
            value = latents(name, value, shape, device)
            if name not in DIFFERENTIATED:
                check_constant(name, value)
        found.append(value)
    seed = given.get("seed")
    offset = check_offset(given.get("latent_offset"), seed)
    key = None if seed is None else seeds(seed, shape, device, offset)
    return Transitions(Latents._make(found), key, full_table(coeffs, shape, model_output), scale)


def elements(t: Transitions) -> Tensor | None:
    """D of each transition where a mask says which elements count, [K, B] float64; else None.

    At least 1: without any element that counts, a transition's sums are 0, and this makes its
    ratio 1 and its gradient 0.
    """
    return None if t.latents.mask is None else masks.counts(t.latents.mask).clamp(min=1)


def counted(t: Transitions) -> Tensor:
    """How many of these latents' elements count, of each transition, [K, B] float64."""
    if t.latents.mask is not None:
        return masks.counts(t.latents.mask)
    *_, steps, batch = t.coefficients.shape
    numel = t.latents.model_output.shape[-1]
    return torch.full((steps, batch), numel, dtype=torch.float64, device=t.coefficients.device)


def numel_of(t: Transitions, elements: Tensor | None) -> int | Tensor:
    """D of a call's transitions: a number, or [K, B]."""
    return t.latents.model_output.shape[-1] if elements is None else elements


def old_log_prob(shape: CallShape, model_output: Tensor, given: Given) -> Tensor | None:
    """``old_log_prob`` as [K, B]; None unless the call is in the log-prob form."""
    old = given.get("old_log_prob")
    return None if old is None else per_transition("old_log_prob", old, shape, model_output.device)


def check_coefficients(coeffs: StepCoefficients) -> None:
    """Raises unless ``coeffs`` are StepCoefficients."""
    if not isinstance(coeffs, StepCoefficients):
        raise TypeError(
            f"`coeffs` is a {type(coeffs).__name__}; it needs StepCoefficients, as schedule[k] is"
        )


def check_config(config: GuardConfig) -> None:
    """Raises unless ``config`` is a GuardConfig."""
    if not isinstance(config, GuardConfig):
        raise TypeError(f"`config` is a {type(config).__name__}; it needs a GuardConfig")


def check_gaussian(coeffs: StepCoefficients, ratio_norm: str) -> None:
    """Raises for coefficients without the Gaussian kappa, on which ``log r + kl_old`` relies."""
    if not coeffs.gaussian:
        raise ValueError(
            f"`config.ratio_norm` is {ratio_norm}, which needs the Gaussian kappa 1 / (2 s^2); "
            "`coeffs` are of a kind without it"
        )


def check_balance(config: GuardConfig, steps: int) -> None:
    """Raises for a balance over a sample's steps in a call that has one of them."""
    if config.balance == "inverse_ratio" and steps == 1:
        raise ValueError(
            "`config.balance` is inverse_ratio, which weighs a sample's steps against one another, "
            "but this call has one step, whose weight would be 1 whatever its ratio; it needs all "
            "K steps in one call ([K, B, *latent]: guard_loss_and_grad without a graph, then "
            'velocity.backward(grad[k]) step by step), `step_weights`, or balance="none"'
        )


def check_reduction(reduction: str) -> None:
    """Raises unless ``reduction`` is one of the ways to reduce a log-density over a latent."""
    check_choice("reduction", reduction, ("mean", "sum"))


def check_tensor(name: str, value: object) -> Tensor:
    """Returns ``value`` if it is a plain tensor of a dtype that kernels take; else raises."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATING:
        check_floating(name, value)
    assert isinstance(value, Tensor)
    if not torch.compiler.is_compiling():
        check_plain(name, value)
    return value


def check_plain(name: str, value: Tensor) -> None:
    """Raises for a tensor that is not what a kernel reads: a block of memory with strides."""
    if value.layout is not torch.strided or value.is_nested:
        check_dense(name, value)
    kind = type(value).__name__
    if kind == "DTensor":
        raise TypeError(
            f"`{name}` is a DTensor, of which each rank holds a part; it needs that part, "
            "to_local() (process_group= is for ranks with other samples, latent_group= for ranks "
            "that share latents)"
        )
    if is_functorch(value):
        raise TypeError(
            f"`{name}` is a tensor of a torch.func transform (grad, vmap, ...); it needs a plain "
            "one: an op takes a whole batch, and its gradient is backward()'s"
        )
    if forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"`{name}` has a forward-mode tangent (torch.autograd.forward_ad), which no op of "
            "guard_ops propagates; use backward()"
        )
    if kind in OWNERS and value.numel() and not value.untyped_storage().nbytes():
        check_dense(name, value)
