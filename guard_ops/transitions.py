"""Transitions: the checked [K, B, D] operands that every backend function takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .config import GuardConfig
from .schedule import StepCoefficients, check_coefficients

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .statistics import RatioStatistics

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

FORMS = {
    "mean": ("sample", "prev_sample", "old_mean"),
    "velocity": ("sample", "prev_sample", "old_model_output"),
    "noise": ("old_model_output", "noise"),
    "seeded": ("old_model_output", "seed"),
    "log-prob": ("sample", "prev_sample", "old_log_prob"),
}


class LossArguments(NamedTuple):
    """The arguments of a loss as its caller gave them, in the order of :class:`Transitions`."""

    model_output: Tensor
    model_output_uncond: Tensor | None
    ref_model_output: Tensor | None
    sample: Tensor | None
    prev_sample: Tensor | None
    old_mean: Tensor | None
    old_model_output: Tensor | None
    noise: Tensor | None
    seed: int | Tensor | None
    coeffs: StepCoefficients
    guidance_scale: float | None
    old_log_prob: Tensor | None
    advantages: Tensor | None = None  # from here on: not of a log-ratio alone
    step_weights: Tensor | None = None
    config: GuardConfig = GuardConfig()
    statistics: RatioStatistics | None = None
    process_group: ProcessGroup | None = None


class Transitions(NamedTuple):
    """K x B transitions with latents flattened to D dense elements; strides over K and B are free.

    Which of the optional ones are present says how the behaviour policy is given (:data:`FORMS`).
    No property: torch.compile of 2.9 compares a named tuple's without asking for its value.
    """

    model_output: Tensor  # [K, B, D] v
    model_output_uncond: Tensor | None  # [K, B, D]: v = uncond + guidance_scale (v - uncond)
    ref_model_output: Tensor | None  # [K, B, D]
    sample: Tensor | None  # [K, B, D] x
    prev_sample: Tensor | None  # [K, B, D] y
    old_mean: Tensor | None  # [K, B, D] m
    old_model_output: Tensor | None  # [K, B, D]
    noise: Tensor | None  # [K, B, D]
    seed: Tensor | None  # [K, B, 2] int64: Philox key, transition
    coefficients: Tensor  # [5, K, B] float64: a, b, s, kappa, dt
    guidance_scale: float

    def form(self) -> str:
        """A key of :data:`FORMS`."""
        if self.seed is not None:
            return "seeded"
        if self.noise is not None:
            return "noise"
        if self.old_model_output is not None:
            return "velocity"
        return "log-prob" if self.old_mean is None else "mean"

    def compute_dtype(self) -> torch.dtype:
        """float64 if any operand is, else float32."""
        return compute_dtype(*(x for x in self[:8] if x is not None))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: what the arithmetic runs in."""
    wide = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


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
    count = 1
    for size in shape:
        count *= size
    transition = torch.arange(count, device=device).reshape(shape)
    return torch.stack([torch.full_like(transition, seed), transition], -1)


class Shape(NamedTuple):
    """How the caller shaped a call: ``[K, B, *latent]``, or ``[B, *latent]`` for one step."""

    steps: int
    batch: int
    latent: tuple[int, ...]
    one_step: bool

    def leading(self) -> tuple[int, ...]:
        """``(B,)`` or ``(K, B)``."""
        return (self.batch,) if self.one_step else (self.steps, self.batch)

    def full(self) -> tuple[int, ...]:
        return self.leading() + self.latent


def check_shape(model_output: Tensor, coeffs: StepCoefficients) -> Shape:
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
    if coeffs.device != model_output.device:
        raise ValueError(
            f"`coeffs` is on {coeffs.device} but `model_output` on {model_output.device}; "
            "use schedule.to(device) once"
        )
    want = shape[: len(coeffs.shape)]
    if tuple(coeffs.shape) != want:
        raise ValueError(
            f"`coeffs` has shape {tuple(coeffs.shape)} but `model_output` {shape} needs {want}"
        )
    steps = 1 if one_step else shape[0]
    return Shape(steps, shape[leading - 1], shape[leading:], one_step)


def expand_coefficients(coeffs: StepCoefficients, shape: Shape) -> StepCoefficients:
    """[5, K, B] whatever they were."""
    table = coeffs.table
    table = table.reshape(table.shape + (1,) * (3 - table.ndim))
    return StepCoefficients._of(
        table.expand(5, shape.steps, shape.batch), coeffs.gaussian, coeffs.deterministic
    )


def check_stochastic(coeffs: StepCoefficients) -> None:
    """A deterministic step has no density and so no ratio."""
    if coeffs.deterministic:
        raise ValueError(
            f"`coeffs` has s == 0 at step {', '.join(map(str, coeffs.deterministic))} of this call:"
            " a deterministic step (an ODE tail, or the last step of cps) has no density; leave it"
            " out"
        )


def latents(name: str, value: Tensor, shape: Shape, device: torch.device) -> Tensor:
    """[K, B, D] of a floating ``[K, B, *latent]``; a copy only if its latent is not dense."""
    check_tensor(name, value)
    given, wanted = tuple(value.shape), shape.full()
    if given != wanted:
        raise ValueError(f"`{name}` has shape {given} but `model_output` {wanted}")
    if value.device != device:
        raise ValueError(f"`{name}` is on {value.device} but `model_output` on {device}")
    return flatten(value, shape.steps, shape.batch)


def flatten(value: Tensor, steps: int, batch: int) -> Tensor:
    """[K, B, D] with dense D; a view when the latent is dense."""
    value = value.reshape(steps, batch, -1)
    return value if value.stride(2) == 1 or value.shape[2] == 1 else value.contiguous()


def constant(name: str, value: Tensor, shape: Shape, device: torch.device) -> Tensor:
    """:func:`latents` of an operand that the loss does not differentiate."""
    value = latents(name, value, shape, device)
    check_constant(name, value)
    return value


def check_constant(name: str, value: Tensor) -> None:
    """What carries a gradient that would be ignored is refused."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"`{name}` requires grad but is a constant of the loss; detach it")


def per_transition(
    name: str,
    value: Tensor | None,
    shape: Shape,
    device: torch.device,
    *,
    per_sample: bool = False,
) -> Tensor:
    """[K, B] float64 or float32 of a floating tensor of that shape.

    ([B] for one step, or ``per_sample``). 16-bit numbers become float32, which holds them.
    """
    value = check_tensor(name, value)
    check_constant(name, value)
    ok = tuple(value.shape) == shape.leading()
    if per_sample and tuple(value.shape) == (shape.batch,):
        ok, value = True, value.expand(shape.steps, shape.batch)
    if not ok:
        choices = {shape.leading(), (shape.batch,)} if per_sample else {shape.leading()}
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)}; with `model_output` of shape {shape.full()} "
            f"it needs {' or '.join(map(str, sorted(choices, key=len)))}"
        )
    if value.device != device:
        raise ValueError(f"`{name}` is on {value.device} but `model_output` on {device}")
    value = value.reshape(shape.steps, shape.batch)
    return value if value.element_size() > 2 else value.float()


def seeds(seed: int | Tensor, shape: Shape, device: torch.device) -> Tensor:
    """[K, B, 2] int64 from what the caller passed as ``seed``."""
    if not isinstance(seed, Tensor):
        if shape.steps > 1 and isinstance(seed, int):
            raise ValueError(
                f"`seed` is the int {seed} for {shape.steps} steps; it needs the rollout's seeds, "
                "philox_seed(seed, (K, B))"
            )
        return philox_seed(seed, (1, shape.batch), device)
    if seed.dtype != torch.int64:
        raise TypeError(f"`seed` has dtype {seed.dtype}; it needs torch.int64, as philox_seed's")
    if tuple(seed.shape) != (*shape.leading(), 2):
        raise ValueError(
            f"`seed` has shape {tuple(seed.shape)} but `model_output` {shape.full()} needs "
            f"{(*shape.leading(), 2)}"
        )
    if seed.device != device:
        raise ValueError(f"`seed` is on {seed.device} but `model_output` on {device}")
    return seed.reshape(shape.steps, shape.batch, 2)


_BEHAVIOUR = sorted({name for names in FORMS.values() for name in names})


def check_form(given: LossArguments) -> str:
    """The one form that the given operands make; raises for none, half of one, or two at once."""
    present = {name for name in _BEHAVIOUR if getattr(given, name) is not None}
    form = next((f for f, names in FORMS.items() if set(names) == present), None)
    if form is None:
        options = "; ".join(f"{name}: {' + '.join(parts)}" for name, parts in FORMS.items())
        raise ValueError(
            f"the behaviour policy is given by {' + '.join(sorted(present)) or 'nothing'}; it "
            f"needs exactly one of the forms  {options}"
        )
    return form


def gather(shape: Shape, coeffs: StepCoefficients, given: LossArguments) -> Transitions:
    """Check every operand and flatten it to [K, B, D]; ``coeffs`` are [K, B]."""
    device = given.model_output.device

    def flat(name: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else constant(name, value, shape, device)

    uncond, scale, seed = given.model_output_uncond, given.guidance_scale, given.seed
    if (uncond is None) != (scale is None):
        missing = "guidance_scale" if scale is None else "model_output_uncond"
        raise ValueError(f"`{missing}` is missing: classifier-free guidance needs both")
    if isinstance(scale, bool) or not isinstance(scale, (int, float, type(None))):
        raise TypeError(f"`guidance_scale` is a {type(scale).__name__}; it needs a float")
    if uncond is not None:
        uncond = latents("model_output_uncond", uncond, shape, device)
    return Transitions(
        latents("model_output", given.model_output, shape, device),
        uncond,
        flat("ref_model_output", given.ref_model_output),
        flat("sample", given.sample),
        flat("prev_sample", given.prev_sample),
        flat("old_mean", given.old_mean),
        flat("old_model_output", given.old_model_output),
        flat("noise", given.noise),
        None if seed is None else seeds(seed, shape, device),
        coeffs.table,
        1.0 if scale is None else float(scale),
    )


def check_tensor(name: str, value: object) -> Tensor:
    """A floating tensor of a dtype that the kernels know."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` is a {type(value).__name__}; it needs a tensor")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"`{name}` has dtype {value.dtype}; it needs float64, float32, bfloat16 or float16"
        )
    return value
