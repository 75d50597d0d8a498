"""What can be set: flat keys, each with a type; a recipe is a YAML file of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional

MISSING: Any = "???"  # OmegaConf's mark of a key that has to be given

Objective = Literal["article", "paper", "flow_grpo", "dance_grpo"]


@dataclass
class Recipe:
    """A run of the trainer on a diffusers pipeline."""

    # the run
    model: str = MISSING  # a folder in diffusers' format, or an id of the hub
    prompts: str = MISSING  # a .txt or .jsonl file, a folder as flow_grpo has it, or a shipped name
    out: str = MISSING  # folder of everything that is written
    reward: str = "jpeg_size"  # or "module:function", or several with + between them
    reward_options: list[str] = field(default_factory=list)  # name.key=value
    reward_weights: Optional[list[float]] = None  # noqa: UP045  of several; null: 1 each
    reward_advantages: Literal["summed", "separate"] = "summed"  # separate: GDPO
    reward_timeout: Optional[float] = 240.0  # noqa: UP045  seconds for a batch; below `timeout`
    reward_retries: int = 1  # of a batch, before the run stops
    reward_overlap: bool = True  # the reward works while the next samples are made; no result
    objective: Objective = "article"
    iterations: int = 1000
    seed: int = 0
    resume: bool = False  # from the newest intact checkpoint in `out`

    # an iteration
    prompts_per_iteration: int = 48
    group_size: int = 24
    minibatches: int = 2  # optimizer steps of a pass over the samples
    inner_epochs: int = 1
    micro_batch: Optional[int] = 1  # noqa: UP045  transitions with a graph at a time; no result
    rollout_batch: Optional[int] = 8  # noqa: UP045  samples of a call without a graph

    # the sampler
    steps: int = 10
    height: int = 512
    width: int = 512
    frames: int = 1
    guidance_scale: float = 1.0
    guidance_gradient: Literal["both", "conditional"] = "both"
    negative_prompt: str = ""
    text_length: int = 256
    noise_level: float = 0.7
    sde: Literal["flow_sde", "dance_sde", "wan_sde", "cps"] = "flow_sde"
    window: Literal["all", "subset", "subset_per_sample", "random_window", "sliding_window"] = "all"
    window_size: Optional[int] = None  # noqa: UP045
    window_first: int = 0  # of the steps that may be trained
    window_last: Optional[int] = -1  # noqa: UP045
    window_every: int = 25
    window_stride: int = 1
    outside: Literal["sde", "ode"] = "sde"  # steps that are not trained
    branch: bool = False  # samples of a group part where training begins

    # the objective; null leaves what the objective is published with
    clip: Optional[float] = None  # noqa: UP045
    kl_beta: float = 0.0
    advantage_scale: Literal["group", "batch", "none"] = "group"
    advantage_clip: float = 5.0
    nonfinite: Literal["propagate", "drop"] = "propagate"

    # the weights
    train: Literal["lora", "full"] = "lora"
    lora_rank: int = 32
    lora_alpha: float = 64.0
    lora_targets: Optional[list[str]] = None  # noqa: UP045  null: those of the published recipes
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # float16 would need loss scaling
    checkpointing: bool = True
    compile: bool = False  # the transformer's blocks
    sharding: Literal["ddp", "fsdp"] = "ddp"
    decode_batch: int = 2
    timeout: float = 600.0  # seconds for which ranks wait for one, as while it reads a checkpoint

    # what is recorded
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    evaluate_every: int = 20
    evaluation_steps: int = 28
    evaluation_prompts: int = 8  # pictures of the first prompts, always from the same noise
    gold: str = ""  # a reward that training never sees, as `reward`: turns the monitor on
    gold_options: list[str] = field(default_factory=list)  # name.key=value
    gold_prompts: Optional[str] = None  # noqa: UP045  null: the test prompts beside `prompts`
    gold_samples: int = 200  # of the held-out prompts in turn, always from the same noise
    gold_features: str = "pixels"  # or "module:function", for distances
    stop_over_optimizing: bool = False  # end the run where the monitor raises its alarm
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    encodings: Optional[str] = None  # noqa: UP045  folder of encoded prompts; null: in `out`


@dataclass
class DigitsRecipe:
    """The digits job: a flow on 8x8 digits, pretrained and fine-tuned on a CPU in a minute."""

    out: str = MISSING
    objective: Literal["article", "paper", "flow_grpo"] = "article"
    iterations: int = 120
    seed: int = 0
    resume: bool = False
    learning_rate: float = 4e-4
    pretrain_steps: int = 3000
    checkpoint_every: int = 10
    evaluate_every: int = 10
    stop_over_optimizing: bool = False  # end the run where the monitor raises its alarm
