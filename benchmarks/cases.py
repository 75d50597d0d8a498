"""Lists what is timed: the races of the named workloads, and every op, form, mode and dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from .workloads import CI, READS, Workload

DTYPES = (torch.float32, torch.bfloat16)
FORMS = tuple(READS)
OBJECTIVES = ("article", "paper", "flow_grpo")
STAGES = ("forward", "backward", "both")
COPY = "memory copy"


@dataclass(frozen=True)
class Case:
    """One race. ``stage`` is "both" (loss and gradient), "forward" or "backward" alone.

    ``recipe`` is the published recipe's workload, and ``workload`` the one that runs. They differ
    if the recipe's is larger than the machine's budget.
    """

    workload: Workload
    recipe: Workload
    op: str  # guard_loss, log_ratio, sde_step
    stage: str
    form: str
    objective: str  # a constructor of GuardConfig; "-" for an op that has none
    dtype: torch.dtype
    chains: tuple[str | None, ...] = ()  # plain PyTorch too: None is eager, else a compile mode
    plain: bool = False  # whether ``reference`` runs too, as it does wherever a chain does

    @property
    def name(self) -> str:
        """A title for progress bars and test ids."""
        parts = (self.workload.name, self.op, self.stage, self.form, self.objective)
        return " ".join([*(part for part in parts if part != "-"), dtype_name(self.dtype)])


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its module: ``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def workload_cases(
    workloads: Iterable[Workload], elements: int, every_chain: bool = False
) -> Iterator[Case]:
    """Loss and gradient of each recipe in the mean form; the noise and seeded forms run beside it.

    ``torch.compile`` runs in float32 only, as a compilation takes ten seconds for each shape. Its
    max-autotune mode runs on ``ci`` only: that has templates for matrix products, and on a CPU it
    generates the kernels of the default mode for these losses. ``every_chain`` runs all everywhere.
    """
    for recipe in workloads:
        for dtype in DTYPES:
            chains: tuple[str | None, ...] = (None,)
            if every_chain or dtype == torch.float32:
                chains += ("default",)
            if every_chain or (dtype == torch.float32 and recipe.name == CI.name):
                chains += ("max-autotune",)
            yield Case(
                recipe.within(elements),
                recipe,
                "guard_loss",
                "both",
                "mean",
                recipe.objective,
                dtype,
                chains,
            )


def op_cases(recipe: Workload, elements: int) -> Iterator[Case]:
    """Every op on one workload: forms and stages, objectives, dtypes.

    ``reference`` takes as long as fifty kernels, so it runs beside each op's first form only, in
    float32.
    """
    workload = recipe.within(elements)
    for dtype in DTYPES:
        wide = dtype == torch.float32
        for form in ("noise", "seeded"):
            plain = wide and form == "noise"
            yield Case(workload, recipe, "sde_step", "forward", form, "-", dtype, plain=plain)
        for op in ("log_ratio", "guard_loss"):
            objective = "article" if op == "guard_loss" else "-"
            for form in FORMS:
                plain = wide and form == FORMS[0]
                for stage in STAGES:
                    yield Case(workload, recipe, op, stage, form, objective, dtype, plain=plain)
        for objective in OBJECTIVES[1:]:
            for form in ("mean", "noise"):
                yield Case(workload, recipe, "guard_loss", "both", form, objective, dtype)


def floor_bytes(case: Case, form: str | None = None) -> int:
    """Bytes that the op must move: each operand it needs read once, each result written once.

    ``guard_loss`` writes its gradient while it reads, so its backward alone has nothing left to
    move, and its forward without a gradient writes nothing. ``log_ratio`` gets its two coefficients
    only in backward, so it reads its operands again there.
    """
    form = case.form if form is None else form
    size = case.dtype.itemsize
    wide = max(size, torch.float32.itemsize)
    if case.op == "sde_step":  # v, x and perhaps the noise; y and the mean
        return case.workload.numel * (2 * size + (size if form == "noise" else 0) + size + wide)
    reads = sum(wide if name == "old_mean" else size for name in READS[form])
    per_element = {
        ("guard_loss", "forward"): reads,
        ("guard_loss", "backward"): 0,
        ("guard_loss", "both"): reads + size,
        ("log_ratio", "forward"): reads,
        ("log_ratio", "backward"): reads + size,
        ("log_ratio", "both"): 2 * reads + size,
    }[case.op, case.stage]
    return case.workload.numel * per_element
