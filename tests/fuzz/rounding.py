"""Numbers that carry a bound of their rounding error, so that no tolerance has to be guessed.

``Rounded`` holds what exact arithmetic gives (in float64) and how far a computation in its format
may be from it: every operation adds the error that IEEE arithmetic allows it to the errors that it
was given, multiplied by its derivative. A formula written with these numbers is its own running
error analysis (Wilkinson's), so a tolerance is large exactly where the formula is ill-conditioned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """A floating-point format."""

    unit: float  # roundoff: the largest relative error of a rounding
    tiny: float  # what a result below it may be off by
    huge: float  # the largest number


def format_of(dtype: torch.dtype) -> Format:
    """Arithmetic may flush numbers below the smallest normal one; 16-bit dtypes are only stored."""
    info = torch.finfo(dtype)
    return Format(
        info.eps / 2, info.tiny if info.bits > 16 else info.smallest_normal * info.eps, info.max
    )


SINGLE, DOUBLE = format_of(torch.float32), format_of(torch.float64)


class Rounded:
    """``value`` is exact (float64); what is computed lies within ``error`` of it."""

    def __init__(self, value: Tensor, error: Tensor | float, format: Format) -> None:
        self.value, self.format = value, format
        self.error = torch.as_tensor(error, dtype=torch.float64).expand_as(value)

    @classmethod
    def exact(cls, value: Tensor | float, format: Format = DOUBLE) -> Rounded:
        """A number that the computation is given as it is."""
        return cls(torch.as_tensor(value, dtype=torch.float64), 0.0, format)

    def to(self, format: Format) -> Rounded:
        """The same number, rounded to another format if that is the narrower one."""
        if format.unit <= self.format.unit:
            return Rounded(self.value, self.error, format)
        return _rounded(self.value, self.error, format)

    def __mul__(self, other: Rounded | float) -> Rounded:
        x, y = self, _as(other, self.format)
        error = x.value.abs() * y.error + y.value.abs() * x.error + x.error * y.error
        return _rounded(x.value * y.value, error, _wider(x, y))

    __rmul__ = __mul__

    def __truediv__(self, other: Rounded | float) -> Rounded:
        x, y = self, _as(other, self.format)
        value = x.value / y.value
        left = (y.value.abs() - y.error).clamp(min=0)  # of the denominator, at worst
        return _rounded(value, (x.error + value.abs() * y.error) / left, _wider(x, y))

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error, self.format)

    def __add__(self, other: Rounded | float) -> Rounded:
        return total(self, _as(other, self.format))

    __radd__ = __add__

    def __sub__(self, other: Rounded | float) -> Rounded:
        return total(self, -_as(other, self.format))

    def map(self, value: Tensor, slope: Tensor) -> Rounded:
        """A function of the number: its value here, and its steepest slope within the error."""
        return _rounded(value, slope * self.error + 3 * self.format.unit * value.abs(), self.format)

    def expm1(self) -> Rounded:
        return self.map(torch.expm1(self.value), torch.exp(self.value + self.error))

    def clamp(self, low: float = -math.inf, high: float = math.inf) -> Rounded:
        return Rounded(self.value.clamp(low, high), self.error, self.format)

    def where(self, mask: Tensor, other: float = 0.0) -> Rounded:
        """The number where ``mask``, exactly ``other`` elsewhere."""
        return Rounded(
            torch.where(mask, self.value, other), torch.where(mask, self.error, 0.0), self.format
        )

    def shaped(self, change: Callable[[Tensor], Tensor]) -> Rounded:
        """With ``change``, of indices or shape alone, done to value and error."""
        return Rounded(change(self.value), change(self.error), self.format)

    def sum(self, dim: int = -1) -> Rounded:
        """A sum over a dimension, in whatever order its terms are added.

        With n terms the bound of the rounding alone is n - 1 units of the sum of magnitudes in the
        worst order; as rounding errors are as good as independent, 6 sqrt(n) units are exceeded
        with a probability below 1e-7 (Higham and Mary 2019). Zeros are added without an error.
        """
        size = self.value.abs() + self.error
        roundings = ((size > 0).sum(dim) - 1).clamp(min=0).double()
        units = torch.minimum(roundings, 6 * roundings.sqrt()) * self.format.unit
        magnitude = size.sum(dim)
        error = self.error.sum(dim) + units * magnitude
        return _checked(self.value.sum(dim), error, magnitude, self.format)


def total(*terms: Rounded) -> Rounded:
    """A sum of a few terms in whatever order; that of two is rounded once, as a whole."""
    value = sum(t.value for t in terms)
    magnitude = sum(t.value.abs() + t.error for t in terms)
    error = sum(t.error for t in terms)
    format = max((t.format for t in terms), key=lambda f: f.unit)
    rounded = value.abs() + error if len(terms) == 2 else (len(terms) - 1) * magnitude
    return _checked(value, error + format.unit * rounded, magnitude, format)


def _as(number: Rounded | float, format: Format) -> Rounded:
    return number if isinstance(number, Rounded) else Rounded.exact(number, format)


def _wider(x: Rounded, y: Rounded) -> Format:
    return max(x.format, y.format, key=lambda f: f.unit)


def _rounded(value: Tensor, error: Tensor, format: Format) -> Rounded:
    """With one rounding to ``format`` more, below whose smallest number all digits may be lost."""
    magnitude = value.abs() + error
    lost = torch.where(magnitude > 0, format.tiny, 0.0)
    return _checked(value, error + format.unit * magnitude + lost, magnitude, format)


def _checked(value: Tensor, error: Tensor, magnitude: Tensor, format: Format) -> Rounded:
    """Of what may have overflowed on the way nothing is known."""
    return Rounded(value, torch.where(magnitude > format.huge / 8, math.inf, error), format)
