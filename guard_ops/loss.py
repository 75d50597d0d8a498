"""The loss: checks its arguments, has a backend compute it, and returns it with diagnostics."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, backends, callers, inference, over_ranks, ranks, transitions
from . import objective as objectives
from .config import RATIO_NORMS, GuardConfig, Objective, objective_of
from .objective import Metrics
from .options import LossOptions, Names, takes
from .schedule import StepCoefficients
from .statistics import check_statistics
from .transitions import CallShape, Given, Rows, Transitions, check_tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ARTICLE = GuardConfig.article()
_NAMES = Names(LossOptions)


class GuardLossOutput(NamedTuple):
    """What :func:`guard_loss` returns; only ``loss`` carries a gradient."""

    loss: Tensor  # []
    log_ratio: Tensor  # [K, B]
    excess: Tensor  # [K, B] r_hat - 1
    weights: Tensor  # [K, B] balance weights
    kl: Tensor  # [K, B] to the reference model; 0 without one
    metrics: Metrics  # each [K]


class LossAndGrad(NamedTuple):
    """What :func:`guard_loss_and_grad` returns; none of it requires grad."""

    loss: Tensor  # []
    grad: Tensor | tuple[Tensor, Tensor]  # shaped as model_output; a pair with guidance
    log_ratio: Tensor  # [K, B]; this and the rest are as in GuardLossOutput
    excess: Tensor
    weights: Tensor
    kl: Tensor
    metrics: Metrics


@takes(LossOptions)
def guard_loss(model_output: Tensor, **options: Unpack[LossOptions]) -> GuardLossOutput:
    """The GRPO-Guard policy loss over K steps: loss, gradient and diagnostics in one pass.

    ``mean_i sum_k w_ki max(-A r_hat, -A clip(r_hat)) + kl_beta mean_ki KL(new || ref)``.

    Args:
        model_output: v, [K, B, *latent], or [B, *latent] for one step; the only operand (with
            ``model_output_uncond``) that is differentiated.
        advantages: [B], or [K, B]; any floating dtype, like every operand.
        coeffs: ``schedule[...]`` of shape [] (one step), [K] or [K, B].
        config: a GuardConfig; default ``GuardConfig.article()``.
        sample, prev_sample, old_mean | sample, prev_sample, old_model_output |
        old_model_output, noise | old_model_output, seed | sample, prev_sample, old_log_prob:
            the behaviour policy, in exactly one of the forms mean, velocity, noise, seeded
            (:func:`guard_ops.philox_seed`) and log-prob ([K, B]); latents shaped as v.
        ref_model_output: the reference model's velocity, for ``kl_beta``.
        model_output_uncond, guidance_scale: classifier-free guidance,
            ``v = uncond + scale (v - uncond)``; ``old_model_output`` is then the combined one.
        mask: which elements count, bool (or floating: not 0), [*latent], [B or 1, *latent] or
            [K or 1, B or 1, *latent]. The rest (padding, given frames) change nothing, whatever
            they hold, and their gradient is 0; D, over which a mean is taken, is each transition's
            count. One without any has ratio 1 and gradient 0.
        latent_group: the ranks of which each has a part of every latent's elements (context
            parallel). The loss and its numbers are those of the whole latents, alike on all of
            them, and the gradient is that of the part.
        latent_offset: in the seeded form, which element of the whole latent is this part's first
            one: a multiple of 4.
        step_weights: [K, B] instead of ``config.balance``; a call of one step needs them where the
            balance is "inverse_ratio" (the default config's), which weighs K steps.
        statistics: RatioNorm's mean and std from elsewhere (micro-batches, running average).
        process_group: compute RatioNorm's statistics over the ranks of this group.

    Returns:
        GuardLossOutput; float32 diagnostics (float64 if an operand is), [B] for one step.

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """
    transitions.check_options("guard_loss", options, _NAMES)
    shape, loss, per_row, metrics = computed(model_output, options)
    return GuardLossOutput(loss, *_diagnostics(shape, per_row, metrics))


def computed(model_output: Tensor, given: Given) -> tuple[CallShape, Tensor, Tensor, Tensor]:
    """:func:`guard_loss` of its keyword arguments, its diagnostics as a backend returns them.

    To name all of those takes as long as ten operators, which a caller that reads two can save.

    Returns:
        The call's shape, the loss [], per_row [4, K, B] (log_ratio, excess, weights, kl) and
        metrics [11, K] in the order of Metrics.
    """
    call = _check(model_output, given, history=True)
    if call.fused is not None:
        loss, per_row, metrics = autograd.guard_loss(
            call.backend,
            call.fused,
            call.t,
            call.rows,
            call.objective,
            model_output,
            given.get("model_output_uncond"),
        )
    else:
        loss, per_row, metrics = _composed(call)
    return call.shape, loss, per_row, metrics


@takes(LossOptions)
def guard_loss_and_grad(model_output: Tensor, **options: Unpack[LossOptions]) -> LossAndGrad:
    """:func:`guard_loss` for callers that push the gradient themselves (pipelines, offloading).

    It takes the same arguments, and raises the same.

    Returns:
        LossAndGrad: the loss, ``d loss / d model_output`` (with classifier-free guidance the pair
        of that and ``d loss / d model_output_uncond``), and :func:`guard_loss`'s diagnostics.
    """
    transitions.check_options("guard_loss_and_grad", options, _NAMES)
    guided = options.get("model_output_uncond") is not None
    if torch.is_grad_enabled():
        call = _check(model_output, options, history=False)
    else:
        with torch.enable_grad():  # a constant that requires grad is refused all the same
            call = _check(model_output, options, history=False)
    grads: tuple[Tensor, ...]
    if call.fused is not None:  # none of whose tensors requires grad by now
        loss, grad, grad_uncond, per_row, metrics, _ = call.fused(
            call.t, call.rows, call.objective, True, guided
        )
        grads = (grad, grad_uncond)
    else:
        loss, per_row, metrics, grads = _differentiated(call)
    grad, *more = (x.view(model_output.shape) for x in grads if x.numel())
    if guided:
        (grad_uncond,) = more
        handed: Tensor | tuple[Tensor, Tensor] = (grad, grad_uncond)
    else:
        handed = grad
    return LossAndGrad(loss.detach(), handed, *_diagnostics(call.shape, per_row, metrics))


@inference.lasting  # where there is no autograd
def _differentiated(call: LossCall) -> tuple[Tensor, Tensor, Tensor, Any]:
    """What :func:`_composed` returns, and the gradients by the outputs that the call has."""
    latents = call.t.latents
    outputs = [latents.model_output, latents.model_output_uncond]
    with torch.enable_grad():
        leaves = [transitions.normal(x).detach().requires_grad_() for x in outputs if x is not None]
        of = dict(zip(transitions.DIFFERENTIATED, leaves))  # noqa: B905, one without guidance
        call = call._replace(t=call.t._replace(latents=latents._replace(**of)))
        loss, per_row, metrics = _composed(call)
        return loss, per_row, metrics, torch.autograd.grad(loss, leaves)


def _diagnostics(
    shape: CallShape, per_row: Tensor, metrics: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Metrics]:
    """log_ratio, excess, weights, kl and the metrics, without K if the caller gave one step."""
    if shape.one_step:
        per_row, metrics = per_row.squeeze(1), metrics.squeeze(1)
    log_ratio, excess, weights, kl = per_row.unbind(0)
    return log_ratio, excess, weights, kl, Metrics(*metrics.unbind(0))


# ---- the arguments ------------------------------------------------------------------------------


class LossCall(NamedTuple):
    """A loss whose arguments are checked."""

    backend: ModuleType
    fused: autograd.Fused | None  # computes loss and gradient; None where they are composed
    groups: over_ranks.Groups
    shape: CallShape
    t: Transitions
    rows: Rows
    config: GuardConfig
    objective: Objective  # the config as kernels take it
    gaussian: bool


def _check(model_output: Tensor, given: Given, *, history: bool) -> LossCall:
    """Checks every argument and reshapes it for backends; raises as :func:`guard_loss` says.

    ``history``: whether autograd may differentiate through the operands that are made here. A fused
    backend's Function is given the caller's own outputs instead, so these are detached, and no
    reshaping costs an autograd node.
    """
    coeffs: StepCoefficients = given["coeffs"]
    shape = transitions.check_shape(model_output, coeffs)
    backend = backends.select(model_output.device)
    config = given.get("config")
    config = _ARTICLE if config is None else config
    transitions.check_config(config)
    groups = _groups(config, given)
    tracing = torch.compiler.is_compiling()
    fused = None
    if backend.FUSED and shape.batch <= backends.max_batch(backend):
        if groups.latent is None and groups.process is None:
            fused = backend.guard_loss
        elif not tracing:
            fused = functools.partial(over_ranks.guard_loss, backend, groups, config)
    if not history or (fused is not None and not tracing):
        model_output, given = _without_history(model_output, given)
    t = transitions.gather(shape, model_output, given)
    device = model_output.device
    advantages = transitions.per_transition(
        "advantages", given["advantages"], shape, device, per_sample=True
    )
    step_weights = given.get("step_weights")
    if step_weights is not None:
        step_weights = transitions.per_transition("step_weights", step_weights, shape, device)
    old = transitions.old_log_prob(shape, model_output, given)
    mean_std = _check_objective(config, shape, model_output, given)
    velocities = tuple([x.dtype for x in t.latents.velocities()])
    make = objective_of.__wrapped__ if tracing else objective_of
    objective = make(config, coeffs.gaussian, velocities, t.guidance_scale)
    # of the whole latents; where each rank has a part of them, _composed and over_ranks find these
    elements, statistics = None if groups.latent is not None else transitions.elements(t), None
    if mean_std is not None:
        numel = transitions.numel_of(t, elements)
        table = StepCoefficients._of(t.coefficients, coeffs.gaussian, ())
        square = objectives.squared_gain(table, numel, config.reduction).mean(-1)
        floor = objectives.std_floor(square, config, objective.named()["rounding"])
        statistics = torch.cat([mean_std, floor.unsqueeze(0)])
    rows = Rows(advantages, old, step_weights, elements, statistics)
    return LossCall(backend, fused, groups, shape, t, rows, config, objective, coeffs.gaussian)


def _groups(config: GuardConfig, given: Given) -> over_ranks.Groups:
    """The call's process groups, less one whose numbers its objective does not need."""
    needed = RATIO_NORMS[config.ratio_norm].statistics
    return over_ranks.Groups(
        given.get("latent_group"), given.get("process_group") if needed else None
    )


def _without_history(model_output: Tensor, given: Given) -> tuple[Tensor, Given]:
    """The same arguments with both model outputs detached."""
    uncond = given.get("model_output_uncond")
    if uncond is not None:
        check_tensor("model_output_uncond", uncond)
        given = {**given, "model_output_uncond": uncond.detach()}
    return model_output.detach() if model_output.requires_grad else model_output, given


_warned_single = False


def _check_objective(
    config: GuardConfig, shape: CallShape, model_output: Tensor, given: Given
) -> Tensor | None:
    """Checks that the call has what its objective needs; returns given statistics as [2, K]."""
    global _warned_single
    if given.get("step_weights") is None:
        transitions.check_balance(config, shape.steps)
    statistics, process_group = given.get("statistics"), given.get("process_group")
    if given.get("latent_group") is not None:
        ranks.check_group("latent_group", given["latent_group"])
    needs = RATIO_NORMS[config.ratio_norm]
    if needs.debiased:
        transitions.check_gaussian(given["coeffs"], config.ratio_norm)
        if given.get("old_log_prob") is not None:
            raise ValueError(
                f"`config.ratio_norm` is {config.ratio_norm}, which needs the behaviour policy's "
                "mean; the log-prob form does not know it"
            )
    wrong = ""  # the conditions are not combined, as torch.compile may hold kl_beta as a symbol
    if given.get("ref_model_output") is None:
        if config.kl_beta:
            wrong = "missing"
    elif not config.kl_beta:
        wrong = "given but `config.kl_beta` is 0"
    if wrong:
        raise ValueError(f"`ref_model_output` is {wrong}; the KL term needs both")
    external = statistics is not None or process_group is not None
    if external and needs.statistics and not config.detach_stats:
        raise ValueError(
            "`config.detach_stats` is False, but statistics from other batches are constants of "
            "this gradient; it needs True"
        )
    if process_group is not None:
        if statistics is not None:
            raise ValueError(
                "`statistics` and `process_group` are both given; all-reduce the statistics and "
                "pass them alone"
            )
        ranks.check_group("process_group", process_group)
    if statistics is not None:
        mean_std = check_statistics(
            statistics, config, torch.Size(shape.leading()[:-1]), model_output.device
        )
        return torch.stack(mean_std).reshape(2, shape.steps)
    alone = needs.statistics and shape.batch == 1 and not external
    if alone and not _warned_single and not torch.compiler.is_compiling():
        _warned_single = True
        warnings.warn(
            f"guard_ops: {config.ratio_norm} over a batch of one sample is degenerate; the loss is "
            "plain GRPO's (pass statistics= or process_group= to see more samples)",
            RuntimeWarning,
            stacklevel=callers.outside(),
        )
    return None


# ---- without a fused backend --------------------------------------------------------------------


def _composed(call: LossCall) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, per_row and metrics as a fused backend returns them, by its sums and objective.py.

    It exchanges the same numbers with other ranks as :func:`over_ranks.guard_loss`.
    """
    t, config, groups = call.t, call.config, call.groups
    advantages, old_log_prob, step_weights, elements, statistics = (
        None if x is None else transitions.normal(x).double() for x in call.rows
    )
    assert advantages is not None
    sums = autograd.transition_sums(call.backend, t)
    if groups.latent is not None:
        sums, elements = autograd.over_shards(sums, t, groups.latent)
    numel = transitions.numel_of(t, elements)
    mean_std = None if statistics is None else (statistics[0], statistics[1])
    coeffs = StepCoefficients._of(t.coefficients, call.gaussian, ())
    log_r, kl_old, kl = objectives.log_ratio_and_kl(
        sums,
        coeffs,
        numel,
        config.reduction,
        old_log_prob,
    )
    square = objectives.squared_gain(coeffs, numel, config.reduction)
    if groups.process is None:
        floor = objectives.std_floor(square.mean(-1), config, call.objective.named()["rounding"])
    else:
        seen = log_r.detach()
        finite = objectives.finite_transitions(
            seen,
            kl_old.detach(),
            kl.detach(),
            advantages,
            coeffs,
            config,
            step_weights,
            None,
            t.compute_dtype(),
            0.0,  # a floor is for statistics that are known
        )
        found = objectives.ratio_statistics(seen, finite, square)
        mean, std, floor = over_ranks.of_all_ranks(found, config, call.objective, groups.process)
        mean_std = mean, std
    result = objectives.evaluate(
        log_r,
        kl_old,
        kl,
        advantages,
        coeffs,
        config,
        step_weights,
        mean_std,
        t.compute_dtype(),
        floor,
    )
    per_row = torch.stack([log_r.detach(), result.excess, result.weights, kl.detach()])
    dtype = t.compute_dtype()
    return result.loss.to(dtype), per_row.to(dtype), torch.stack(result.metrics).to(dtype)
