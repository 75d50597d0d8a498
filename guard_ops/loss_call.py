"""One call of a loss: its arguments checked, and what its backend is told."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import backends, callers, extension, transitions
from .autograd import Problem
from .backends import select
from .blocks import check_config, check_gaussian, check_statistics
from .schedule import StepCoefficients
from .transitions import LossArguments, Shape, Transitions

if TYPE_CHECKING:
    from ._C import PlainCall

try:
    _plain_call = getattr(extension.load(), "plain_call", None)  # None: built before it was there
except ImportError:
    _plain_call = None


class LossCall(NamedTuple):
    """A loss whose arguments are checked."""

    backend: ModuleType
    fused: bool  # whether one call of the backend does it all
    shape: Shape
    t: Transitions  # of the outputs without their history where `fused` can do without
    problem: Problem
    coeffs: StepCoefficients  # [K, B] where not `fused`
    plain: PlainCall | None = None  # t and problem in C++


class Plain(NamedTuple):
    """A fused backend's call that has nothing wrong or unusual about it."""

    backend: ModuleType
    operands: PlainCall
    mean_std: Tensor | None  # [2, K] float64


def check(given: LossArguments) -> LossCall:
    """Every argument of :func:`guard_ops.guard_loss`, checked; raises as it says."""
    compiling = torch.compiler.is_compiling()
    shape = transitions.check_shape(given.model_output, given.coeffs)
    device = given.model_output.device
    backend = select(device)
    fused = (
        backend.FUSED and given.process_group is None and shape.batch <= backends.max_batch(backend)
    )
    if fused and not compiling:  # the views below need no autograd node each
        given = without_history(given)
    t, full, old = prepare(shape, given)
    adv = transitions.per_transition("advantages", given.advantages, shape, device, per_sample=True)
    step_weights = given.step_weights
    if step_weights is not None:
        step_weights = transitions.per_transition("step_weights", step_weights, shape, device)
    mean_std = _check_objective(given, full, shape)
    problem = Problem(adv, old, step_weights, mean_std, given.config, full.gaussian)
    return LossCall(backend, fused, shape, t, problem, full)


def plain_call(given: LossArguments, *, keep: bool = True) -> Plain | None:
    """Every argument checked and viewed at once, in C++; None where :func:`check` has to look.

    In Python the checks cost as much as the kernel does on a small latent. This accepts nothing
    that they refuse and says nothing: what it does not accept is theirs to view, convert or refuse.
    ``keep``: whether autograd will keep the operands for a backward.
    """
    coeffs = given.coeffs
    if _plain_call is None or torch.compiler.is_compiling() or given.process_group is not None:
        return None
    if not isinstance(coeffs, StepCoefficients) or coeffs.deterministic:
        return None
    operands = _plain_call(given, coeffs.table, keep)
    if operands is None:
        return None
    backend, shape = select(given.model_output.device), Shape._make(operands.shape)
    if not backend.FUSED or shape.batch > backends.max_batch(backend):
        return None
    mean_std = _check_objective(given, coeffs, shape)
    if mean_std is not None and type(mean_std) is not Tensor:
        return None
    return Plain(backend, operands, mean_std)


def of(plain: Plain, given: LossArguments) -> LossCall:
    """A plain call as :func:`check` returns it."""
    operands = plain.operands
    t = Transitions._make(operands.transitions())
    problem = Problem(*operands.rows(), plain.mean_std, given.config, given.coeffs.gaussian)
    shape = Shape._make(operands.shape)
    return LossCall(plain.backend, True, shape, t, problem, given.coeffs, operands)


def without_history(given: LossArguments) -> LossArguments:
    """The same arguments with both outputs detached."""
    v, uncond = given[:2]
    transitions.check_tensor("model_output", v)
    if uncond is not None:
        transitions.check_tensor("model_output_uncond", uncond)
        uncond = uncond.detach()
    return given._replace(model_output=v.detach(), model_output_uncond=uncond)


def prepare(
    shape: Shape, given: LossArguments
) -> tuple[Transitions, StepCoefficients, Tensor | None]:
    """Check the operands of a loss; (transitions, coefficients [K, B], old_log_prob [K, B])."""
    transitions.check_stochastic(given.coeffs)
    transitions.check_form(given)
    full = transitions.expand_coefficients(given.coeffs, shape)
    t = transitions.gather(shape, full, given)
    old = given.old_log_prob
    if old is not None:
        old = transitions.per_transition("old_log_prob", old, shape, t[0].device)
    return t, full, old


_warned_single = False


def _check_objective(given: LossArguments, coeffs: StepCoefficients, shape: Shape) -> Tensor | None:
    """What the objective needs of the call; the given statistics as [2, K]."""
    global _warned_single
    config, statistics = given.config, given.statistics
    check_config(config)
    if config.ratio_norm == "closed_form":
        check_gaussian(coeffs)
        if given.old_log_prob is not None:
            raise ValueError(
                "`config.ratio_norm` is closed_form, which needs the behaviour policy's mean; the "
                "log-prob form does not know it"
            )
    wrong = ""  # each condition by itself: torch.compile may hold kl_beta as a symbol
    if given.ref_model_output is None:
        if config.kl_beta:
            wrong = "missing"
    elif not config.kl_beta:
        wrong = "given but `config.kl_beta` is 0"
    if wrong:
        raise ValueError(f"`ref_model_output` is {wrong}; the KL term needs both")
    external = statistics is not None or given.process_group is not None
    if external and config.ratio_norm == "standardize" and not config.detach_stats:
        raise ValueError(
            "`config.detach_stats` is False, but statistics from other batches are constants of "
            "this gradient; it needs True"
        )
    if statistics is not None:
        if given.process_group is not None:
            raise ValueError(
                "`statistics` and `process_group` are both given; all-reduce the statistics and "
                "pass them alone"
            )
        mean_std = check_statistics(
            statistics, config, torch.Size(shape.leading()[:-1]), given.model_output.device
        )
        return torch.stack(mean_std).reshape(2, shape.steps)
    if config.ratio_norm != "standardize":
        return None
    alone = shape.batch == 1 and not external and not torch.compiler.is_compiling()
    if alone and not _warned_single:
        _warned_single = True
        warnings.warn(
            "guard_ops: standardize over a batch of one sample is degenerate; the loss is "
            "plain GRPO's (pass statistics= or process_group= to see more samples)",
            RuntimeWarning,
            stacklevel=callers.outside(),
        )
    return None
