"""Guard Ops: fused kernels for GRPO on flow-matching generators, with GRPO-Guard built in."""

from .advantages import group_advantages
from .backends import available_backends, use_backend
from .blocks import balance_weights, clipped_surrogate, ratio_norm
from .config import GuardConfig
from .loss import GuardLossOutput, LossAndGrad, guard_loss, guard_loss_and_grad
from .objective import Metrics
from .ops import LogRatio, SdeStep, log_prob, log_ratio, sde_step
from .ranks import rank_weight
from .schedule import SdeSchedule, StepCoefficients
from .statistics import RatioStatistics
from .transitions import philox_seed
from .version import __version__ as __version__

__all__ = [
    "GuardConfig",
    "GuardLossOutput",
    "LogRatio",
    "LossAndGrad",
    "Metrics",
    "RatioStatistics",
    "SdeSchedule",
    "SdeStep",
    "StepCoefficients",
    "available_backends",
    "balance_weights",
    "clipped_surrogate",
    "group_advantages",
    "guard_loss",
    "guard_loss_and_grad",
    "log_prob",
    "log_ratio",
    "philox_seed",
    "rank_weight",
    "ratio_norm",
    "sde_step",
    "use_backend",
]
