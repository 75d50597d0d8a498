"""A thin GRPO trainer for flow models; drives any object with the :class:`FlowPolicy` protocol."""

from .checkpoint import CheckpointError
from .config import TrainConfig
from .ema import Ema
from .engine import Engine
from .folder import RunFolderError
from .judging import Judge, RewardError
from .loop import Loop, Rollout
from .policy import Condition, FlowPolicy, Reward, Schedule, Scores
from .trainer import Trainer
from .window import Window

__all__ = [
    "CheckpointError",
    "Condition",
    "Ema",
    "Engine",
    "FlowPolicy",
    "Judge",
    "Loop",
    "Reward",
    "RewardError",
    "Rollout",
    "RunFolderError",
    "Schedule",
    "Scores",
    "TrainConfig",
    "Trainer",
    "Window",
]
