"""Whether a contender's results are those of the truth, within the truth's own error bound."""

from __future__ import annotations

from collections.abc import Callable

import torch
from contenders import Results, contenders
from operations import Call
from rounding import Rounded, format_of
from tally import tally
from torch import Tensor
from truth import Expected, UndecidedError

# Contenders order their operations in other ways than the truth does: e - delta for y - mean, a
# product by a reciprocal, the derivative's factors in another order. Each costs a few roundings of
# quantities that the truth's bound already has, never an unbounded multiple of it.
SLACK = 2.0


def mismatch(name: str, got: Tensor, expected: Rounded) -> str:
    """Where ``got`` differs by more than rounding; empty if nowhere.

    What is not finite in the truth has to be so in ``got``, as infinity or NaN.
    """
    value = got.detach().double().reshape(expected.value.shape)
    result = format_of(got.dtype)
    error = torch.nan_to_num(expected.error, nan=torch.inf, posinf=torch.inf)
    bound = SLACK * error + result.unit * expected.value.abs() + result.tiny
    same = torch.where(expected.value.isfinite(), value == expected.value, ~value.isfinite())
    close = (value - expected.value).abs() <= bound
    unknown = error.isinf() & expected.value.isfinite()
    wrong = ~(same | close | unknown)
    if not bool(wrong.any()):
        return ""
    where = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{name}{list(where)} is {value[where].item()!r}, where {expected.value[where].item()!r} "
        f"is right within {bound[where].item():.3g} ({int(wrong.sum())} of {wrong.numel()} wrong)"
    )


def differences(got: dict[str, Tensor], expected: dict[str, Rounded]) -> list[str]:
    """All that is wrong in a contender's results."""
    missing = [f"{name} is missing" for name in expected if name not in got]
    named = ((name, got[name], expected[name]) for name in expected if name in got)
    return missing + [text for each in named if (text := mismatch(*each))]


def agree(call: Call, truth: Callable[[], Expected]) -> list[tuple[str, Results]]:
    """Fails where a contender's results are not the truth; returns all results by contender."""
    try:
        expected = truth()
    except UndecidedError:
        expected = None
    found = []
    for contender in contenders():
        if not contender.takes(call.arguments):
            continue
        got = contender.run(call)
        if expected is not None:
            wrong = differences(got, expected)
            assert not wrong, f"{contender.name}: " + "; ".join(wrong)
        found.append((contender.name, got))
    tally(call.op, *(name for name, _ in found), decided=expected is not None)
    return found
