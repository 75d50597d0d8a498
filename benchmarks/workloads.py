"""The workloads: latents of real backbones, with batch and steps as published GRPO recipes train.

A recipe's ``batch`` is the micro-batch of one process, and ``steps`` are the trained steps of a
trajectory. ``objective`` and ``kind`` are those of its trainer, so that guard_ops races against the
trainer's own chain.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line names workloads without importing torch
    import torch

# The operands that one pass over the data reads, by form.
READS = {
    "mean": ("model_output", "sample", "prev_sample", "old_mean"),
    "velocity": ("model_output", "old_model_output", "sample", "prev_sample"),
    "noise": ("model_output", "old_model_output", "noise"),
    "seeded": ("model_output", "old_model_output"),
    "log-prob": ("model_output", "sample", "prev_sample"),
}

# Those of them that the gradient reads again if it needs every transition's ratio first, as the
# article's does, and the batch does not fit on the chip. docs/math.md explains it in "One pass".
READ_AGAIN = {
    "mean": ("model_output", "sample", "prev_sample"),
    "velocity": ("model_output", "sample", "prev_sample"),
    "noise": ("model_output", "old_model_output", "noise"),
    "seeded": ("model_output", "old_model_output"),
    "log-prob": ("model_output", "sample", "prev_sample"),
}


@dataclass(frozen=True)
class Workload:
    """Latents [steps, batch, *latent]; ``recipe`` says whose batch and steps these are."""

    name: str
    backbone: str
    latent: tuple[int, ...]
    batch: int
    steps: int
    recipe: str
    objective: str = "article"  # a constructor of GuardConfig
    kind: str = "flow_sde"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(K, B, *latent)``."""
        return (self.steps, self.batch, *self.latent)

    @property
    def numel(self) -> int:
        """Elements of all K x B latents."""
        return math.prod(self.shape)

    def within(self, elements: int) -> Workload:
        """The same latents in fewer steps, then fewer samples, until at most ``elements`` remain.

        At least one transition stays, whatever its size.
        """
        transitions = max(1, elements // math.prod(self.latent))
        batch = min(self.batch, transitions)
        steps = min(self.steps, max(1, transitions // batch))
        return dataclasses.replace(self, batch=batch, steps=steps)

    def with_batch(self, batch: int) -> Workload:
        """One step of ``batch`` samples."""
        return dataclasses.replace(self, batch=batch, steps=1)

    def floor_bytes(self, form: str, dtype: torch.dtype) -> int:
        """Bytes that loss plus gradient must move: :func:`bytes_per_element` of every element."""
        return self.numel * bytes_per_element(form, dtype)


def bytes_per_element(form: str, dtype: torch.dtype) -> int:
    """Bytes to read each operand once and to write the gradient once; old_mean is float32.

    Raises:
        KeyError: there is no such form.
    """
    return _bytes(READS[form], dtype) + dtype.itemsize


def bytes_in_two_passes(form: str, dtype: torch.dtype) -> int:
    """:func:`bytes_per_element`, and those that the gradient's pass reads again (``READ_AGAIN``).

    Raises:
        KeyError: there is no such form.
    """
    return bytes_per_element(form, dtype) + _bytes(READ_AGAIN[form], dtype)


def _bytes(operands: tuple[str, ...], dtype: torch.dtype) -> int:
    wide = max(dtype.itemsize, 4)  # old_mean is float32, or float64
    return sum(wide if name == "old_mean" else dtype.itemsize for name in operands)


CI = Workload("ci", "FLUX.1-dev 1024, one step", (4096, 64), 8, 1, "none: a quick race")

WORKLOADS = {
    workload.name: workload
    for workload in (
        CI,
        Workload(
            "sd35_512",
            "SD3.5-M 512",
            (16, 64, 64),
            9,
            9,
            "flow_grpo general_ocr_sd3: 9 of 10",
            "flow_grpo",
        ),
        Workload(
            "sd35_1024",
            "SD3.5-M 1024",
            (16, 128, 128),
            9,
            9,
            "flow_grpo's 512 recipe at 1024",
            "flow_grpo",
        ),
        Workload(
            "flux_512",
            "FLUX.1-dev 512",
            (1024, 64),
            3,
            5,
            "flow_grpo pickscore_flux: 5 of 6",
            "flow_grpo",
        ),
        Workload(
            "flux_1024", "FLUX.1-dev 1024", (4096, 64), 3, 5, "flow_grpo's 512 recipe", "flow_grpo"
        ),
        Workload(
            "qwen_image_1328",
            "Qwen-Image 1328",
            (6889, 64),
            16,
            2,
            "verl-omni grpoguard_trainer: a window of 2 steps",
            "paper",
        ),
        Workload(
            "wan21_480p",
            "Wan2.1 480p, 81 frames",
            (16, 21, 60, 104),
            8,
            19,
            "flow_grpo general_ocr_wan2_1 (240p there): 19 of 20",
            "flow_grpo",
        ),
        Workload(
            "wan21_720p",
            "Wan2.1 720p, 81 frames",
            (16, 21, 90, 160),
            4,
            2,
            "verl-omni dancegrpo_trainer (Wan2.2): a window of 2 steps",
            "dance_grpo",
            "dance_sde",
        ),
        Workload(
            "hunyuan_720p",
            "HunyuanVideo 720p, 129 frames",
            (16, 33, 90, 160),
            1,
            9,
            "DanceGRPO finetune_hunyuan_grpo (480p there): 0.6 of 15 steps",
            "dance_grpo",
            "dance_sde",
        ),
    )
}


def named(names: list[str] | None) -> list[Workload]:
    """The workloads of these names, all of them for None.

    Raises:
        ValueError: there is no such workload; the message names those that there are.
    """
    for name in names or ():
        if name not in WORKLOADS:
            raise ValueError(f"there is no workload {name!r}; there are {', '.join(WORKLOADS)}")
    return [WORKLOADS[name] for name in dict.fromkeys(names or WORKLOADS)]
