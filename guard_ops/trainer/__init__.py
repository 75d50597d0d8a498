"""A thin GRPO trainer for flow models; drives any object with the :class:`FlowPolicy` protocol."""

from .checkpoint import CheckpointError
from .config import TrainConfig
from .ema import Ema
from .folder import RunFolderError
from .loop import Rollout, Trainer
from .policy import FlowPolicy, Reward

__all__ = [
    "CheckpointError",
    "Ema",
    "FlowPolicy",
    "Reward",
    "Rollout",
    "RunFolderError",
    "TrainConfig",
    "Trainer",
]
