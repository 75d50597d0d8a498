"""sigmas -> the coefficients of each denoising step's Gaussian policy ``y ~ N(a x + b v, s^2)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import inference
from .checks import FLOATING, check_choice, check_dense, check_device, check_number, describe

SdeKind = Literal["flow_sde", "dance_sde", "wan_sde", "cps"]

ROUNDING = 1e-6  # a sigma that exceeds 1 by no more was meant to be 1, as 1.0000001 was
NEAR_PURE_NOISE = 2e-3  # schedulers that avoid sigma = 1 begin within this of it: 0.999999, 0.999


class SdeRule(NamedTuple):
    """All that tells one kind of stochastic step from another; sigmas may be [], [N] or [K, B]."""

    std: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # from sigma, next, eta, sigma_max
    mean: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # a, b from sigma, next, std
    diffusion: bool  # whether s = std sqrt(-dt); else s = std
    gaussian: bool  # whether kappa = 1 / (2 s^2) and densities keep their constants; else kappa = 1
    largest_noise_level: float  # an infinite noise level is never allowed, even if this is inf


def _diffusion_mean(sigma: Tensor, sigma_next: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    dt = sigma_next - sigma
    return 1 + std**2 / (2 * sigma) * dt, (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt


def _flow_sde_std(sigma: Tensor, sigma_next: Tensor, eta: Tensor, sigma_max: Tensor) -> Tensor:
    spread = sigma / (1 - torch.where(_starts(sigma, sigma_next, sigma_max), sigma_max, sigma))
    return eta.expand_as(sigma) * spread.sqrt()


def _starts(sigma: Tensor, sigma_next: Tensor, sigma_max: Tensor) -> Tensor:
    """Where a step starts from what is pure noise but for rounding, or for a scheduler's margin.

    There ``sigma / (1 - sigma)`` says nothing about the step: it is as large as the distance to 1
    happens to be small. Only the first step of a schedule, the one from above ``sigma_max``, can be
    such a step, and only if it is longer than what it leaves to 1.
    """
    left = 1 - sigma
    first = (sigma > sigma_max) & (left <= NEAR_PURE_NOISE) & (left < sigma - sigma_next)
    return first | (sigma == 1)


def _dance_sde_std(sigma: Tensor, sigma_next: Tensor, eta: Tensor, sigma_max: Tensor) -> Tensor:
    return eta.expand_as(sigma)


def _wan_sde_std(sigma: Tensor, sigma_next: Tensor, eta: Tensor, sigma_max: Tensor) -> Tensor:
    return eta * sigma_max * sigma


def _cps_std(sigma: Tensor, sigma_next: Tensor, eta: Tensor, sigma_max: Tensor) -> Tensor:
    return sigma_next * torch.sin(eta * (math.pi / 2))


def _cps_mean(sigma: Tensor, sigma_next: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    c = (sigma_next**2 - std**2).clamp(min=0.0).sqrt()
    return (1 - sigma_next) + c, -(1 - sigma_next) * sigma + c * (1 - sigma)


SDE_RULES: dict[SdeKind, SdeRule] = {
    "flow_sde": SdeRule(_flow_sde_std, _diffusion_mean, True, True, math.inf),
    "dance_sde": SdeRule(_dance_sde_std, _diffusion_mean, True, True, math.inf),
    "wan_sde": SdeRule(_wan_sde_std, _diffusion_mean, True, True, math.inf),
    "cps": SdeRule(_cps_std, _cps_mean, False, False, 1.0),
}


class StepCoefficients:
    """The numbers of K steps (or of K x B transitions): mean ``a x + b v``, std ``s``.

    Args:
        a, b, s, kappa, dt: floating tensors of one shape, ``[]`` (one step), ``[K]`` or ``[K, B]``
            (samples of a row at different timesteps), on one device; held in float64.
            ``kappa`` is the weight of ``-(y - mean)^2`` in the log-density, ``1 / (2 s^2)`` for a
            Gaussian one; ``dt = sigma_next - sigma < 0``.
        gaussian: whether ``kappa`` is ``1 / (2 s^2)`` and the log-density keeps its two constants;
            False for ``cps``, whose public implementations drop all three.

    Raises:
        ValueError: shapes or devices differ, a value on the CPU is not finite or out of range.
        TypeError: not floating tensors.
    """

    NAMES = ("a", "b", "s", "kappa", "dt")

    @inference.lasting
    def __init__(
        self, a: Tensor, b: Tensor, s: Tensor, kappa: Tensor, dt: Tensor, *, gaussian: bool = True
    ) -> None:
        named = dict(zip(self.NAMES, (a, b, s, kappa, dt), strict=True))
        for name, value in named.items():
            if not isinstance(value, Tensor) or value.dtype not in FLOATING:
                raise TypeError(f"`{name}` is {describe(value)}; it needs a floating tensor")
            check_dense(name, value)
            if value.shape != a.shape or value.device != a.device:
                raise ValueError(
                    f"`{name}` has shape {tuple(value.shape)} on {value.device} but `a` "
                    f"{tuple(a.shape)} on {a.device}"
                )
            if value.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"`{name}` requires grad but coefficients are constants of every op; detach it"
                )
        if a.ndim > 2:
            raise ValueError(f"`a` has shape {tuple(a.shape)}; it needs [], [K] or [K, B]")
        deterministic: tuple[int, ...] = ()
        if a.device.type == "cpu" and not torch.compiler.is_compiling():
            _, wrong = _first_out_of_range(torch.stack(list(named.values())))
            if wrong:
                raise ValueError(f"`{wrong}` has a value that is not finite")
            if bool((s < 0).any()):
                raise ValueError("`s` has a negative value; a standard deviation is >= 0")
            if bool((dt >= 0).any()):
                raise ValueError("`dt` has a value >= 0; sigmas decrease, so dt is negative")
            zero = (s == 0).reshape(s.shape[0] if s.ndim else 1, -1).any(1)
            deterministic = tuple(zero.nonzero().flatten().tolist())
        self._set(torch.stack([x.double() for x in named.values()]), gaussian, deterministic)

    def _set(self, table: Tensor, gaussian: bool, deterministic: tuple[int, ...]) -> None:
        self.table = table  # [5, *shape] float64: a, b, s, kappa, dt
        self.gaussian = gaussian
        self.deterministic = deterministic  # the steps of which the host knows that s == 0

    @classmethod
    def _of(cls, table: Tensor, gaussian: bool, deterministic: tuple[int, ...]) -> StepCoefficients:
        new = cls.__new__(cls)
        new._set(table, gaussian, deterministic)
        return new

    @property
    def a(self) -> Tensor:
        return self.table[0]

    @property
    def b(self) -> Tensor:
        return self.table[1]

    @property
    def s(self) -> Tensor:
        return self.table[2]

    @property
    def kappa(self) -> Tensor:
        return self.table[3]

    @property
    def dt(self) -> Tensor:
        return self.table[4]

    @property
    def shape(self) -> torch.Size:
        """``[]``, ``[K]`` or ``[K, B]``."""
        return self.table.shape[1:]

    @property
    def device(self) -> torch.device:
        return self.table.device

    @inference.lasting
    def to(self, device: torch.device | str) -> StepCoefficients:
        """The same coefficients on another device (float64 stays)."""
        where = check_device("device", device)
        return self._of(self.table.to(where), self.gaussian, self.deterministic)

    def __repr__(self) -> str:
        return f"StepCoefficients(shape={tuple(self.shape)}, device={str(self.device)!r})"


class SdeSchedule:
    """The stochastic sampler's steps: ``schedule[k]`` gives step k's :class:`StepCoefficients`.

    With ``sigma = sigmas[k]``, ``next = sigmas[k + 1]``, ``dt = next - sigma``:

    ============ ============================================ ===================================
    kind         std                                          a, b, s
    ============ ============================================ ===================================
    flow_sde     ``noise_level * sqrt(sigma / (1 - sigma))``  ``1 + std^2 / (2 sigma) dt``,
                 (from pure noise, sigmas[1] in its place)    ``(1 + std^2 (1 - sigma) / (2 sigma))
                                                              dt``, ``std sqrt(-dt)``
    dance_sde    ``noise_level``                              the same
    wan_sde      ``noise_level * sigmas[1] * sigma``          the same
    cps          ``next sin(noise_level pi / 2)``             ``(1 - next) + c``,
                                                              ``-(1 - next) sigma + c (1 - sigma)``,
                                                              ``std``; ``c = sqrt(next^2 - std^2)``
    ============ ============================================ ===================================

    (Flow-GRPO arXiv:2505.05470, DanceGRPO arXiv:2505.07818, coefficient-preserving sampling.
    wan_sde is the step of Flow-GRPO's Wan2.1 script, with the noise level 1: it has none.)

    Flow-GRPO puts ``sigmas[1]`` into the denominator ``1 - sigma`` where sigma is 1. Rounding and
    margins against a division by zero make schedulers begin at 0.99999994, 0.999999 or 0.999
    instead, which would make ``s`` hundreds of times too large; so a first step does the same if it
    begins within 0.002 of 1 and is longer than the distance to 1.

    Args:
        sigmas: N + 1 noise levels, strictly decreasing within [0, 1]; sequence or 1-D tensor. One
            that rounding put above 1, by at most 1e-6, is taken as 1.
        noise_level: eta >= 0; at most 1 for ``cps``. 0 is the ODE: it samples, but has no density.
        kind: a key of SDE_RULES: "flow_sde", "dance_sde", "wan_sde" or "cps".
        device: where the coefficients live; the device of ``sigmas`` when it is a tensor.

    Raises:
        ValueError: any of the above violated. TypeError: not numbers.
    """

    @inference.lasting
    def __init__(
        self,
        sigmas: Sequence[float] | Tensor,
        noise_level: float = 0.7,
        kind: SdeKind = "flow_sde",
        device: torch.device | str | None = None,
    ) -> None:
        device = check_device("device", device)
        if isinstance(sigmas, Tensor):
            device = sigmas.device if device is None else device
            check_dense("sigmas", sigmas)
            if sigmas.ndim != 1 or sigmas.dtype not in FLOATING or sigmas.device.type == "meta":
                raise ValueError(
                    f"`sigmas` is {describe(sigmas)} on {sigmas.device}; it needs one dimension of "
                    "floats that have values"
                )
            values = [float(x) for x in sigmas.tolist()]
        else:
            try:
                each = [x.item() if hasattr(x, "item") else x for x in sigmas]
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"`sigmas` is {describe(sigmas)}; it needs a sequence of floats"
                ) from error
            values = [check_number(f"sigmas[{k}]", x) for k, x in enumerate(each)]
        values = _check_sigmas(values)
        check_choice("kind", kind, tuple(SDE_RULES))
        top, level = SDE_RULES[kind].largest_noise_level, check_number("noise_level", noise_level)
        if not 0.0 <= level <= top or math.isinf(level):
            bound = "< inf" if math.isinf(top) else f"<= {top:g}"
            raise ValueError(
                f"`noise_level` is {noise_level}; {kind} needs 0 <= noise_level {bound}"
            )
        self.sigmas = tuple(values)
        self.noise_level = level
        self.kind: SdeKind = kind
        # on the CPU whatever torch's default device is, as the numbers are looked at here
        line = torch.tensor(values, dtype=torch.float64, device="cpu")
        if type(line) is not Tensor and not torch.compiler.is_compiling():
            raise RuntimeError(
                "an SdeSchedule needs the values of its numbers, and in this mode torch makes only "
                f"a {type(line).__name__}; make the schedule before entering the mode"
            )
        eta = torch.tensor(self.noise_level, dtype=torch.float64, device="cpu")
        table = coefficient_table(line[:-1], line[1:], eta, kind, line[1])  # [5, N]
        k, name = _first_out_of_range(table)
        if name:
            raise ValueError(
                f"`noise_level` is {noise_level} and `sigmas[{k}]` {values[k]}, with which step "
                f"{k}'s {name} is not a finite number; it needs a larger sigma or a noise level "
                "nearer to 1"
            )
        self._deterministic = tuple((table[2] == 0).nonzero().flatten().tolist())
        self._table = table.to(_default_device() if device is None else device)

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        noise_level: float = 0.7,
        kind: SdeKind = "flow_sde",
        device: torch.device | str | None = None,
    ) -> SdeSchedule:
        """The schedule of a diffusers flow-matching scheduler, after its ``set_timesteps``.

        Raises:
            TypeError: ``scheduler`` has no tensor ``sigmas``.
            ValueError: its ``set_timesteps`` was not called, or its sigmas are not a flow's
                (decreasing within [0, 1]).
        """
        sigmas = getattr(scheduler, "sigmas", None)
        if not isinstance(sigmas, Tensor):
            raise TypeError(
                f"`scheduler` is {describe(scheduler)} without a tensor `sigmas`; it needs a "
                "flow-matching scheduler after set_timesteps"
            )
        timesteps = getattr(scheduler, "timesteps", None)
        if isinstance(timesteps, Tensor) and timesteps.shape == sigmas.shape:
            # steps have one end more than beginnings; before set_timesteps the end is not there
            raise ValueError(
                f"`scheduler` is a {type(scheduler).__name__} with the {len(sigmas)} sigmas of its "
                "training; call its set_timesteps(num_inference_steps) first"
            )
        try:
            return cls(sigmas, noise_level, kind, device)
        except ValueError as error:
            raise ValueError(
                f"`scheduler` is a {type(scheduler).__name__}, whose sigmas make no schedule: "
                f"{error}{_remedy(sigmas)}"
            ) from error

    @property
    def device(self) -> torch.device:
        return self._table.device

    @inference.lasting
    def to(self, device: torch.device | str) -> SdeSchedule:
        """The same schedule with its coefficients on ``device``."""
        return SdeSchedule(self.sigmas, self.noise_level, self.kind, device)

    def __len__(self) -> int:
        """N, the number of steps."""
        return len(self.sigmas) - 1

    def __iter__(self) -> Iterator[StepCoefficients]:
        return (self[k] for k in range(len(self)))

    @inference.lasting
    def __getitem__(self, k: int | slice | Sequence[int] | Tensor) -> StepCoefficients:
        """Coefficients of shape ``[]`` (int), ``[K]`` (slice, list, LongTensor) or ``[K, B]``.

        A LongTensor on an accelerator is looked up there, without a host synchronization (an index
        out of range is then the device's own assertion).

        Raises:
            ValueError: an index outside ``0 .. N-1`` (negative ones count from the end).
            TypeError: not an index.
        """
        gaussian = SDE_RULES[self.kind].gaussian
        if isinstance(k, Tensor):
            return self._lookup(k, gaussian)
        n = len(self)
        if isinstance(k, bool):
            raise TypeError(f"`k` is {describe(k)}; it needs an int, slice, list or LongTensor")
        if isinstance(k, int):
            step = self._step(k)
            zero = (0,) if step in self._deterministic else ()
            return StepCoefficients._of(self._table[:, step], gaussian, zero)
        if isinstance(k, slice):
            steps = list(range(*k.indices(n)))
            table = self._table[:, k] if (k.step or 1) > 0 else None
        elif isinstance(k, (list, tuple, range)) and all(type(x) is int for x in k):
            steps, table = [self._step(x) for x in k], None
        else:
            raise TypeError(f"`k` is {describe(k)}; it needs an int, slice, list or LongTensor")
        if not steps:
            raise ValueError(f"`k` is {k!r}, which selects none of the {n} steps")
        if table is None:  # the host would wait for an index that is a list to reach the device
            table = torch.stack([self._table[:, step] for step in steps], 1)
        zeros = tuple(i for i, step in enumerate(steps) if step in self._deterministic)
        return StepCoefficients._of(table, gaussian, zeros)

    def _lookup(self, k: Tensor, gaussian: bool) -> StepCoefficients:
        if k.dtype != torch.int64:
            raise TypeError(f"`k` is {describe(k)}; it needs dtype torch.int64")
        check_dense("k", k)
        if k.ndim > 2 or k.numel() == 0:
            raise ValueError(f"`k` has shape {tuple(k.shape)}; it needs [], [K] or [K, B]")
        if k.device != self.device and not (k.ndim == 0 and k.device.type == "cpu"):
            raise ValueError(
                f"`k` is on {k.device} but the schedule on {self.device}; use schedule.to(device)"
            )
        zeros: tuple[int, ...] = ()
        if k.device.type == "cpu" and not torch.compiler.is_compiling():
            rows = k.reshape(k.shape[0] if k.ndim else 1, -1).tolist()
            steps = [[self._step(x) for x in row] for row in rows]
            zeros = tuple(
                i for i, row in enumerate(steps) if any(x in self._deterministic for x in row)
            )
        if k.device == self.device:  # inductor has no lookup by a tensor without dimensions
            table = self._table[:, k.reshape(-1)].reshape(-1, *k.shape)
        else:
            table = self._table[:, k]
        return StepCoefficients._of(table, gaussian, zeros)

    def _step(self, k: int) -> int:
        n = len(self)
        if not -n <= k < n:
            raise ValueError(f"`k` is {k}, out of range for the {n} steps of this schedule")
        return k % n

    def __repr__(self) -> str:
        return f"SdeSchedule(steps={len(self)}, noise_level={self.noise_level}, kind={self.kind!r})"


@inference.lasting
def coefficient_table(
    sigma: Tensor,  # [*shape] float64
    sigma_next: Tensor,  # [*shape]
    noise_level: Tensor,  # [] or [*shape]
    kind: SdeKind,
    sigma_max: Tensor,  # []: a schedule's sigmas[1], for the step that starts from pure noise
) -> Tensor:
    """``a, b, s, kappa, dt`` of steps from ``sigma`` to ``sigma_next``: [5, *shape] float64.

    The table of :class:`SdeSchedule`, on any device and without a host synchronization.
    """
    rule, dt = SDE_RULES[kind], sigma_next - sigma
    std = rule.std(sigma, sigma_next, noise_level, sigma_max)
    a, b = rule.mean(sigma, sigma_next, std)
    s = std * (-dt).sqrt() if rule.diffusion else std.expand_as(a)
    return torch.stack([a, b, s, 1 / (2 * s**2) if rule.gaussian else torch.ones_like(a), dt])


def _first_out_of_range(table: Tensor) -> tuple[int, str]:
    """The first step of a table [5, *shape] with a number that is not finite, and its name.

    ``kappa = 1 / (2 s^2)`` may be infinite, for a deterministic step. (0, "") if all are finite.
    """
    good = table.isfinite()
    good[3] |= table[3].isinf() & (table[2] == 0)
    if bool(good.all()):
        return 0, ""
    rows = good.flatten(1) if good.ndim > 1 else good[:, None]
    number, step = (~rows).nonzero()[0].tolist()
    return step, StepCoefficients.NAMES[number]


def _default_device() -> torch.device:
    """Where torch makes a tensor that names no device; the CPU where such a tensor has no values.

    A schedule that is made while a model's weights are only described ("meta") is needed later.
    """
    device = torch.empty(0).device
    return torch.device("cpu") if device.type == "meta" else device


def _remedy(sigmas: Tensor) -> str:
    """What to do about a scheduler that has a sigma twice in a row, as a second-order one does."""
    if sigmas.ndim != 1 or len(sigmas.unique_consecutive()) == len(sigmas):
        return ""
    return "; to take each once: SdeSchedule(scheduler.sigmas.unique_consecutive(), ...)"


def _check_sigmas(values: list[float]) -> list[float]:
    """The sigmas, with 1 for what rounding put above it; raises if they are not a flow's."""
    values = [1.0 if 1 < value <= 1 + ROUNDING else value for value in values]
    if len(values) < 2:
        raise ValueError(f"`sigmas` has {len(values)} values; it needs at least 2 (one step)")
    for k, value in enumerate(values):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"`sigmas[{k}]` is {value}; a flow's sigmas lie within [0, 1]")
        if k and not value < values[k - 1]:
            raise ValueError(
                f"`sigmas[{k}]` is {value} after {values[k - 1]}; sigmas must strictly decrease"
            )
    return values
