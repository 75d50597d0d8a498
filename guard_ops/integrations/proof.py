"""Two functions compared on small tensors, over the options of the one that is to be replaced.

A framework's file in ``cases`` says which options there are and how a call is built;
:func:`prove` makes both functions answer the same calls and compares everything that comes back.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends

# Of a tensor's largest magnitude. Two float32 evaluations of one formula differ by up to 4e-5 in a
# gradient, which divides by s^2; another noise level, kind of step or density by 1e-2 and more.
TOLERANCE = 2e-4


class _Omitted:
    def __repr__(self) -> str:
        return "its default"


OMITTED = _Omitted()  # the option is not passed: the original's own default counts


class Cases(NamedTuple):
    """The calls that a function is proved on.

    A name in ``options`` is a parameter of the original, or begins with an underscore: then it is
    about the operands. ``build`` makes a call's arguments by name from one value of each; it is
    called once per function, so that neither sees what the other did to them. What requires a
    gradient in them is differentiated by; every ``torch.Generator`` has to end in the same state.
    """

    options: Mapping[str, Sequence[Any]]  # the values of each, the usual one first
    build: Callable[[dict[str, Any]], dict[str, Any]]


class Proof(NamedTuple):
    """What was compared: ``cases`` calls, each return value and gradient of them."""

    cases: int
    largest: float  # difference, of the magnitude of the tensor that it is in
    seconds: float

    def __str__(self) -> str:
        return f"{self.cases} cases, largest difference {self.largest:.1e}"


class DisprovedError(Exception):
    """The functions differ, or cannot be compared; the message says where."""


def prove(
    original: Callable[..., Any], replacement: Callable[..., Any], make_cases: Callable[[], Cases]
) -> Proof:
    """Compare two functions of the same parameters on every pair of two options' values.

    The caller's modes (inference, no_grad, autocast, default device and dtype, backend) and random
    generators neither matter nor change; everything runs on the CPU, ``make_cases`` as well, whose
    schedulers would else be of the caller's device and dtype.

    Raises:
        DisprovedError: a return value, a gradient or a generator's state differs, or one function
            raises and the other does not, or the original raises in all cases, or ``make_cases``
            raises.
    """
    began, largest, answered = time.perf_counter(), 0.0, 0
    parameters = inspect.signature(original).parameters
    error: Exception | None = None
    with _of_its_own():
        try:
            cases = make_cases()
        except Exception as why:  # of the framework's classes, or of a missing diffusers
            raise DisprovedError(f"it cannot be called to compare: {why!r}") from why
        known = {n: v for n, v in cases.options.items() if n.startswith("_") or n in parameters}
        combinations = covering(known)
        for chosen in combinations:
            where = ", ".join(f"{n.strip('_')}={_show(v)}" for n, v in chosen.items())
            theirs = _answer(original, chosen, cases, parameters)
            ours = _answer(replacement, chosen, cases, parameters)
            if isinstance(theirs, Exception) or isinstance(ours, Exception):
                if not (isinstance(theirs, Exception) and isinstance(ours, Exception)):
                    raise DisprovedError(f"with {where}: {_one_raises(theirs, ours)}")
                error = theirs
                continue
            answered += 1
            largest = max(largest, _compare(theirs, ours, where))
    if not answered:
        raise DisprovedError(f"the original answers none of {len(combinations)} calls: {error!r}")
    return Proof(answered, largest, time.perf_counter() - began)


def covering(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations in which every two values of two options meet; the first has the usual ones.

    Greedy: each combination starts from a pair that has not met and adds of every other option the
    value that brings most new pairs.
    """
    names = list(options)
    sizes = [range(len(options[name])) for name in names]
    ids = range(len(names))
    unmet = {
        ((i, p), (j, q)) for i in ids for j in ids if i < j for p in sizes[i] for q in sizes[j]
    }
    rows = [dict.fromkeys(ids, 0)]
    while True:
        unmet -= {pair for pair in unmet if all(rows[-1][i] == p for i, p in pair)}
        if not unmet:
            break
        row = dict(min(unmet))
        for i in ids:
            if i not in row:
                row[i] = max(
                    sizes[i],
                    key=lambda p: (
                        sum(tuple(sorted([(i, p), other])) in unmet for other in row.items()),
                        -p,
                    ),
                )
        rows.append(row)
    if len(names) == 1:
        rows += [{0: p} for p in sizes[0] if p]
    return [{names[i]: options[names[i]][row[i]] for i in ids} for row in rows]


def _answer(
    function: Callable[..., Any],
    chosen: dict[str, Any],
    cases: Cases,
    parameters: Mapping[str, inspect.Parameter],
) -> dict[str, Any] | Exception:
    """Everything that comes of one call: values, gradients and generators, by what they are."""
    torch.default_generator.manual_seed(20)  # not torch.manual_seed, which seeds accelerators too
    built = cases.build({n: v for n, v in chosen.items() if v is not OMITTED})
    given = {name: value for name, value in built.items() if name in parameters}
    operands = [
        given.pop(name)
        for name, p in parameters.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and name in given
    ]
    try:
        returned = function(*operands, **given)
    except Exception as error:
        return error
    found = dict(_leaves("its result", returned))
    leaves = {n: v for n, v in built.items() if isinstance(v, Tensor) and v.requires_grad}
    for what, value in list(found.items()):
        if isinstance(value, Tensor) and value.requires_grad:
            weights = torch.linspace(-1, 1, value.numel()).reshape(value.shape) + 0.1
            loss = (value.double() * weights).sum()
            grads = torch.autograd.grad(
                loss, list(leaves.values()), retain_graph=True, allow_unused=True
            )
            found |= {
                f"the gradient of {what} by `{name}`": grad
                for name, grad in zip(leaves, grads, strict=True)
            }
    generators = built.get("generator")
    for k, generator in enumerate(
        generators if isinstance(generators, list) else [generators or torch.default_generator]
    ):
        found[f"the state of generator {k} afterwards"] = generator.get_state()
    return found


def _leaves(what: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors and numbers in a nested result, and of what type each container is."""
    if isinstance(value, Mapping):
        parts = {f"{what}[{key!r}]": value[key] for key in value}
    elif isinstance(value, list | tuple):
        parts = {f"{what}[{k}]": part for k, part in enumerate(value)}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f"{what}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
    else:
        yield what, value
        return
    yield f"the type of {what}", f"{type(value).__qualname__} of {len(parts)}"
    for name, part in parts.items():
        yield from _leaves(name, part)


def _compare(theirs: dict[str, Any], ours: dict[str, Any], where: str) -> float:
    largest = 0.0
    for what, expected in theirs.items():
        if what not in ours:
            raise DisprovedError(f"with {where}: {what} is not there")
        got = ours[what]
        if isinstance(expected, Tensor) and isinstance(got, Tensor):
            difference = _difference(expected, got)
            if isinstance(difference, str) or not difference <= TOLERANCE:
                by = difference if isinstance(difference, str) else _by(expected, got, difference)
                raise DisprovedError(f"with {where}: {what} differs {by}")
            largest = max(largest, difference)
        elif type(expected) is not type(got) or expected != got:
            raise DisprovedError(f"with {where}: {what} is {_show(expected)} but ours {_show(got)}")
    more = [what for what in ours if what not in theirs]
    if more:
        raise DisprovedError(f"with {where}: ours has {more[0]}, which the original has not")
    return largest


def _difference(expected: Tensor, got: Tensor) -> float | str:
    """Of the magnitude of ``expected``; in words where the tensors cannot be subtracted.

    Neighbours among the numbers of a 16-bit dtype count as equal: which of them a value between
    them is rounded to, its last digit in float32 decides.
    """
    if expected.shape != got.shape:
        return f"in shape: {tuple(expected.shape)} but ours {tuple(got.shape)}"
    if expected.dtype != got.dtype:
        return f"in dtype: {expected.dtype} but ours {got.dtype}"
    p, q = expected.detach().double(), got.detach().double()
    same = (p == q) | (p.isnan() & q.isnan())
    if bool(same.all()):
        return 0.0
    magnitude = p[p.isfinite()].abs().max() if bool(p.isfinite().any()) else p.new_ones(())
    gap = (p - q).abs()
    if expected.is_floating_point() and torch.finfo(expected.dtype).bits == 16:
        gap = (gap - torch.finfo(expected.dtype).eps * p.abs().maximum(q.abs())).clamp(min=0)
    return float(torch.where(same, 0.0, gap).max() / magnitude.clamp(min=1e-12))


def _by(expected: Tensor, got: Tensor, difference: float) -> str:
    gap = torch.nan_to_num(
        (expected.detach().double() - got.detach().double()).abs(), nan=torch.inf
    )
    at = int(gap.argmax())
    one, other = (float(x.detach().flatten()[at]) for x in (expected, got))
    return f"by {difference:.2g} of its magnitude: {one:.6g} but ours {other:.6g}"


def _one_raises(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, Exception):
        return f"the original raises {theirs!r} and ours does not"
    return f"ours raises {ours!r} and the original does not"


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return repr(value) if isinstance(value, str | int | float | bool | None) else str(value)


@contextmanager
def _of_its_own() -> Iterator[None]:
    """The modes of a fresh interpreter, on the CPU; the caller's, and its generators, come back."""
    dtype, python = torch.get_default_dtype(), random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpys = numpy.random.get_state() if numpy is not None else None
    name = "cpu" if "cpu" in backends.available_backends() else "reference"
    with ExitStack() as stack:
        for mode in (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
            backends.use_backend(name),
        ):
            stack.enter_context(mode)
        if torch.empty(0).device.type != "cpu":  # the mode costs every operator time
            stack.enter_context(torch.device("cpu"))
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(dtype)
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numpys)
