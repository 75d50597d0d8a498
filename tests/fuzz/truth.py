"""The truth of docs/math.md in float64, with the error that a backend's arithmetic may add.

It is written from the equations and shares no code with the package: ``transitions`` has delta, e
and their sums in each form, ``loss`` the objective, ``step`` the rollout's. Operands are taken as
the caller passes them, so that their own rounding, to bfloat16 say, is no error.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import philox_truth
import torch
from rounding import DOUBLE, SINGLE, Rounded, format_of, total
from torch import Tensor

LOG_SQRT_2PI = math.log(math.sqrt(2 * math.pi))
LATENTS = (
    "model_output",
    "model_output_uncond",
    "ref_model_output",
    "sample",
    "prev_sample",
    "old_mean",
    "old_model_output",
    "noise",
)


class UndecidedError(Exception):
    """Rounding alone decides a case's result: a std at its floor, a ratio at the largest number."""


class Operands:
    """A call's arguments as [K, B, D] and [K, B] in float64, and its arithmetic's format."""

    def __init__(self, given: dict[str, Any]) -> None:
        v, coeffs = given["model_output"], given["coeffs"]
        leading = (1, v.shape[0]) if coeffs.a.ndim == 0 else tuple(v.shape[:2])
        self.steps, self.batch = leading
        self.latents = {
            name: given[name].double().reshape(*leading, -1)
            for name in LATENTS
            if given.get(name) is not None
        }
        self.numel = self.latents["model_output"].shape[-1]
        wide = any(given[name].dtype == torch.float64 for name in self.latents)
        self.result = torch.float64 if wide else torch.float32
        self.format = DOUBLE if wide else SINGLE
        self.dtype = v.dtype
        velocities = ("model_output", "model_output_uncond", "old_model_output")
        eps = [torch.finfo(given[x].dtype).eps for x in velocities if x in self.latents]
        self.coarsest = max([each for each in eps if each > 1e-4], default=0.0)  # of 16 bits
        self.uncond_dtype = getattr(given.get("model_output_uncond"), "dtype", None)
        self.gaussian = coeffs.gaussian
        names = ("a", "b", "s", "kappa", "dt")
        table = [getattr(coeffs, name) for name in names]
        table = [x.reshape(x.shape + (1,) * (2 - x.ndim)).expand(leading) for x in table]
        self.table = dict(zip(names, table, strict=True))
        self.scale = given.get("guidance_scale")
        self.seed = given.get("seed")
        if isinstance(self.seed, int):
            number = torch.arange(self.batch)
            self.seed = torch.stack([torch.full_like(number, self.seed), number], -1)
        if self.seed is not None:
            self.seed = self.seed.reshape(*leading, 2)
        self.rows = {
            name: given[name].double().expand(given[name].shape).reshape(leading)
            for name in ("old_log_prob", "step_weights")
            if given.get(name) is not None
        }
        if given.get("advantages") is not None:
            a = given["advantages"].double()
            self.rows["advantages"] = a.reshape(-1, self.batch).expand(leading)

    def coefficient(self, name: str) -> Rounded:
        """[K, B, 1] in the format of the arithmetic over latents."""
        return Rounded.exact(self.table[name].unsqueeze(-1)).to(self.format)

    def latent(self, name: str) -> Rounded:
        return Rounded.exact(self.latents[name], self.format)

    def velocity(self) -> Rounded:
        v = self.latent("model_output")
        if self.scale is None:
            return v
        uncond = self.latent("model_output_uncond")
        return total(uncond, Rounded.exact(self.scale).to(self.format) * total(v, -uncond))

    def noise(self) -> Rounded:
        if self.seed is None:
            return self.latent("noise")
        z = philox_truth.normals(self.seed, self.numel)
        error = (
            1e-6 if self.format == SINGLE else 1e-14
        )  # log, sqrt and sine are each backend's own
        return Rounded(z, error * z.abs().clamp(min=1), self.format)

    def without(self, finite: Tensor) -> Operands:
        """With zeros in place of the latents and numbers of all transitions that are not finite."""
        new = Operands.__new__(Operands)
        new.__dict__ |= self.__dict__
        mask = finite.unsqueeze(-1)
        new.latents = {name: torch.where(mask, x, 0.0) for name, x in self.latents.items()}
        new.rows = {name: torch.where(finite, x, 0.0) for name, x in self.rows.items()}
        return new


Expected = dict[str, Rounded]  # by the names of an op's results, "grad" included


class Sums(NamedTuple):
    """delta and e [K, B, D], the drift from the reference model, and what the sums of them give."""

    delta: Rounded
    e: Rounded
    drift: Rounded | None
    s1: Rounded  # [K, B], as all below
    s2: Rounded
    log_ratio: Rounded
    kl_old: Rounded
    kl: Rounded


def delta_and_e(o: Operands, v: Rounded) -> tuple[Rounded, Rounded]:
    a, b, s = (o.coefficient(name) for name in ("a", "b", "s"))
    if o.seed is not None or "noise" in o.latents:
        return b * total(v, -o.latent("old_model_output")), s * o.noise()
    ax, y = a * o.latent("sample"), o.latent("prev_sample")
    if "old_model_output" in o.latents:
        old = o.latent("old_model_output")
        return b * total(v, -old), total(y, -ax, -(b * old))
    if "old_mean" in o.latents:
        m = o.latent("old_mean")
        return total(ax, b * v, -m), total(y, -m)
    return total(ax, b * v, -y), Rounded.exact(torch.zeros_like(y.value), o.format)


def sums(o: Operands, reduction: str) -> Sums:
    v = o.velocity()
    delta, e = delta_and_e(o, v)
    s1, s2 = ((x * delta).sum().to(DOUBLE) for x in (e, delta))
    kappa, s = o.table["kappa"], Rounded.exact(o.table["s"])
    scale = Rounded.exact(kappa / o.numel if reduction == "mean" else kappa)
    drift, kl = None, Rounded.exact(torch.zeros_like(kappa))
    if "ref_model_output" in o.latents:
        drift = o.coefficient("b") * total(v, -o.latent("ref_model_output"))
        kl = (drift * drift).sum().to(DOUBLE) / (2.0 * s * s * float(o.numel))
    if "old_log_prob" not in o.rows:
        log_ratio, kl_old = scale * total(2.0 * s1, -s2), scale * s2
    else:
        old = Rounded.exact(o.rows["old_log_prob"])
        log_ratio = total(log_density(o, -(scale * s2), reduction), -old)
        kl_old = Rounded.exact(torch.full_like(kappa, math.nan))
    return Sums(delta, e, drift, s1, s2, log_ratio, kl_old, kl)


def log_density(o: Operands, exponent: Rounded, reduction: str) -> Rounded:
    """``exponent - log s - log sqrt(2 pi)``, the constants D times for a sum; cps has neither."""
    if not o.gaussian:
        return exponent
    times = 1.0 if reduction == "mean" else float(o.numel)
    s = Rounded.exact(o.table["s"])
    constant = total(s.map(s.value.log(), torch.zeros_like(s.value)), Rounded.exact(LOG_SQRT_2PI))
    return total(exponent, -(times * constant))


def representable(o: Operands, *numbers: Rounded) -> Tensor:
    """Where numbers are finite in the result's dtype; undecided within 1e6 of its largest one.

    There it depends on what is made of a ratio, times an advantage say, whether that is finite.
    """
    largest = format_of(o.result).huge
    finite = torch.ones_like(numbers[0].value, dtype=torch.bool)
    for x in numbers:
        size = x.value.abs()
        near = (size + x.error > largest / 1e6) & (size <= 2 * largest)
        if bool((near | (size.isfinite() & x.error.isinf())).any()):
            raise UndecidedError("a number near the largest")
        finite &= size <= largest  # not NaN
    return finite


Term = tuple[Rounded, Rounded]  # a coefficient [K, B], and what it is the coefficient of [K, B, D]


def gradient(o: Operands, terms: list[Term], finite: Tensor, missing: float | None) -> Expected:
    """``b`` times the sum of ``terms``, for both branches of the guidance.

    Transitions that are not ``finite`` get ``missing``; None leaves open what.
    """
    b = o.coefficient("b")
    parts, lost = [], torch.zeros_like(b.value)
    for c, of in terms:
        c = c.to(o.format).shaped(lambda x: x.unsqueeze(-1))
        parts.append(c * (b * of))
        lost = lost + o.format.tiny * (1 + c.value.abs() + b.value.abs())  # of either product
    whole = total(*parts)
    whole = Rounded(whole.value, whole.error + lost, whole.format)
    shares = {"grad": (1.0, o.dtype)}
    if o.scale is not None:
        shares = {"grad": (o.scale, o.dtype), "grad_uncond": (1 - o.scale, o.uncond_dtype)}
    out = {}
    for name, (share, dtype) in shares.items():
        error = 2 * DOUBLE.unit * (1 + abs(share))
        part = Rounded(torch.tensor(share, dtype=torch.float64), error, DOUBLE).to(o.format)
        mine = whole if o.scale is None else part * whole
        mine = mine.where(finite.unsqueeze(-1), missing or 0.0).to(format_of(dtype))
        known = finite.unsqueeze(-1) | (missing is not None)
        out[name] = Rounded(mine.value, torch.where(known, mine.error, math.inf), mine.format)
    return out


def log_ratio(given: dict[str, Any], reduction: str, cotangents: tuple[Tensor, Tensor]) -> Expected:
    """``log_ratio`` and ``kl_old``, and the gradient of their products with ``cotangents``."""
    whole = Operands(given)
    raw = sums(whole, reduction)
    finite = representable(whole, raw.log_ratio)
    o = whole.without(finite)
    t = raw if bool(finite.all()) else sums(o, reduction)
    left, right = (x.double().reshape(o.steps, o.batch) for x in cotangents)
    if "old_log_prob" in o.rows:
        right = torch.zeros_like(left)  # kl_old is not known
    kappa = o.table["kappa"] / (o.numel if reduction == "mean" else 1)
    c1, c2 = (Rounded.exact(kappa * c).to(DOUBLE) for c in (2 * left, right - left))
    out = {"log_ratio": raw.log_ratio, "kl_old": raw.kl_old}
    return out | gradient(o, [(c1, t.e), (2.0 * c2, t.delta)], finite, None)


def step(given: dict[str, Any]) -> tuple[Rounded, Rounded]:
    """``mean = a x + b v`` and ``mean + s noise`` [K, B, D] of the rollout's step."""
    o = Operands(given)
    mean = total(o.coefficient("a") * o.latent("sample"), o.coefficient("b") * o.velocity())
    return mean, total(mean, o.coefficient("s") * o.noise())


def log_prob_of(given: dict[str, Any], y: Tensor, mean: Tensor, reduction: str) -> Rounded:
    """[K, B]: the log-density of a returned sample around the returned mean."""
    o = Operands(given)
    y, mean = (x.double().reshape(o.steps, o.batch, -1) for x in (y, mean))
    departure = total(Rounded.exact(y, o.format), -Rounded.exact(mean, o.format))
    square = (departure * departure).sum().to(DOUBLE)
    kappa = o.table["kappa"] / (o.numel if reduction == "mean" else 1)
    return log_density(o, -(Rounded.exact(kappa) * square), reduction)
