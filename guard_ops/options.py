"""The keyword arguments that the losses and log_ratio share, each listed once.

:func:`takes` shows them as the signature of a function of ``**options``, so that ``help`` and
``inspect.signature`` say as much as a signature that is written out would.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from torch import Tensor

from .config import GuardConfig
from .schedule import StepCoefficients

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .statistics import RatioStatistics

Function = TypeVar("Function", bound=Callable[..., Any])


class _Advantages(TypedDict):
    advantages: Tensor  # [B] or [K, B]


class _Coefficients(TypedDict):
    coeffs: StepCoefficients  # schedule[...] of shape [] (one step), [K] or [K, B]


class _Config(TypedDict, total=False):
    config: GuardConfig | None


class TransitionOptions(TypedDict, total=False):
    """The behaviour policy's transitions; latents are shaped like ``model_output``."""

    sample: Tensor | None  # [K, B, *latent]
    prev_sample: Tensor | None  # [K, B, *latent]
    old_mean: Tensor | None  # [K, B, *latent]
    old_model_output: Tensor | None  # [K, B, *latent]
    noise: Tensor | None  # [K, B, *latent]
    seed: Tensor | None  # [K, B, 2] int64
    old_log_prob: Tensor | None  # [K, B]


class _Reference(TypedDict, total=False):
    ref_model_output: Tensor | None  # [K, B, *latent]


class _Guidance(TypedDict, total=False):
    model_output_uncond: Tensor | None  # [K, B, *latent]
    guidance_scale: float | None


class _Mask(TypedDict, total=False):
    mask: Tensor | None  # [*latent], [B or 1, *latent] or [K or 1, B or 1, *latent]


class _Shard(TypedDict, total=False):
    latent_group: ProcessGroup | None  # the ranks that share each latent's elements
    latent_offset: int | None  # where this rank's begin: a multiple of 4


class LogRatioOptions(_Coefficients, TransitionOptions, _Guidance, _Mask, _Shard, total=False):
    """What :func:`guard_ops.log_ratio` takes."""

    reduction: str


class LossOptions(
    _Advantages,
    _Coefficients,
    _Config,
    TransitionOptions,
    _Reference,
    _Guidance,
    _Mask,
    _Shard,
    total=False,
):
    """What :func:`guard_ops.guard_loss` and :func:`guard_ops.guard_loss_and_grad` take."""

    step_weights: Tensor | None  # [K, B]
    statistics: RatioStatistics | None
    process_group: ProcessGroup | None


class Names:
    """The keyword arguments of a TypedDict by name: all of them, and those that must be given."""

    def __init__(self, options: Any) -> None:
        needed = options.__required_keys__
        self.required = tuple(name for name in options.__annotations__ if name in needed)
        optional = tuple(name for name in options.__annotations__ if name not in needed)
        self.known = self.required + optional


def takes(options: Any, **defaults: object) -> Callable[[Function], Function]:
    """Shows the keys of the TypedDict ``options`` as keyword arguments in a function's signature.

    An argument that may be left out is shown with its default: the one in ``defaults``, else None.
    The names that a caller passes are checked by ``transitions.check_options``, not here.
    """

    def decorate(function: Function) -> Function:
        shown, names = inspect.signature(function), Names(options)
        parameters = [p for p in shown.parameters.values() if p.kind is not p.VAR_KEYWORD]
        for name in names.known:
            said = options.__annotations__[name]
            default = inspect.Parameter.empty if name in names.required else defaults.get(name)
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=getattr(said, "__forward_arg__", said),
                )
            )
        function.__signature__ = shown.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate
