"""The demo's numbers as tables: rows of strings, for the terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from .results import Run, SeedResult

LABELS = {
    "flow_grpo": "Flow-GRPO",
    "paper": "GRPO-Guard, paper",
    "article": "GRPO-Guard, article",
}
JUDGED = ("proxy", "gold", "distance", "diversity", "frechet")
_HEADS = ("proxy ↑", "gold ↑", "distance ↓", "diversity ↑", "Fréchet ↓")
_DIGITS = (2, 3, 2, 2, 1)
_STEP_HEADS = ("step", "r: mean - 1", "spread", "r_hat: mean - 1", "spread", "clipped", "above")


class Table(NamedTuple):
    title: str
    head: Sequence[str]
    rows: list[list[str]]


def outcome(result: SeedResult) -> Table:
    """The judges' numbers before fine-tuning, and after it with each objective."""
    first = next(iter(result.runs.values()))
    rows = [["before fine-tuning", *_judged(first.evaluations[0])]]
    rows += [[LABELS[name], *_judged(run.evaluations[-1])] for name, run in result.runs.items()]
    iterations = first.evaluations[-1]["iteration"]
    return Table(f"After {iterations:.0f} iterations", ("", *_HEADS), rows)


def equal_proxy(result: SeedResult) -> Table:
    """Each run's numbers when its proxy first reached the level that all runs have reached."""
    level, paid = at_equal_proxy({name: run.evaluations for name, run in result.runs.items()})
    rows = [
        [LABELS[name], f"{there['iteration']:.0f}", *_judged(there)[1:]]
        for name, there in paid.items()
    ]
    title = f"When the proxy first reached {level:.2f}, which all three did"
    return Table(title, ("", "after", *_HEADS[1:]), rows)


Evaluations = Sequence[Mapping[str, float]]  # of a run, in time; each has a "proxy"


def at_equal_proxy(
    runs: Mapping[str, Evaluations],
) -> tuple[float, dict[str, dict[str, float]]]:
    """The highest proxy that all runs reached, and each run's numbers then, interpolated."""
    level = min(max(e["proxy"] for e in evaluations) for evaluations in runs.values())
    return level, {name: _when(evaluations, level) for name, evaluations in runs.items()}


def per_step(run: Run, objective: str) -> Table:
    """Each trained denoising step's ratio over the whole training."""
    names = (
        "ratio_bias", "ratio_std", "ratio_hat_bias", "ratio_hat_std", "clip_fraction",
        "clip_fraction_high",
    )  # fmt: skip
    columns = [step_means(run, name) for name in names]
    formats: list[Callable[[float], str]] = [_small, _small, _small, _small, _share, _share]
    rows = [
        [str(k), *(form(x) for form, x in zip(formats, values, strict=True))]
        for k, values in enumerate(zip(*columns, strict=True))
    ]
    return Table(f"{LABELS[objective]}, per denoising step", _STEP_HEADS, rows)


def effect(result: SeedResult) -> Table:
    """The article's claims about the ratio, in one line each."""
    raw, guard = result.runs["flow_grpo"], result.runs["article"]
    spread, bias = step_means(raw, "ratio_std"), step_means(raw, "ratio_bias")
    normalized = step_means(guard, "ratio_hat_std")
    ratio = max(normalized) / min(normalized)
    rows = [
        [
            "Flow-GRPO: spread at the last trained step / the first",
            f"{spread[-1] / spread[0]:.0f}x",
        ],
        ["Flow-GRPO: mean - 1 at the last trained step", _small(bias[-1])],
        ["GRPO-Guard, article: normalized spread, largest / smallest", f"{ratio:.2f}x"],
    ]
    for name, run in result.runs.items():
        above = step_means(run, "clip_fraction_high")
        cells = [f"{LABELS[name]}: above the clip", f"{_share(min(above))} to {_share(max(above))}"]
        rows.append(cells)
    return Table("The ratio over the denoising steps", ("", ""), rows)


def step_means(run: Run, name: str) -> list[float]:
    """Mean over the iterations of a per-step metric, [K]."""
    return [fmean(values) for values in zip(*(line[name] for line in run.lines), strict=True)]


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown, without its title."""
    rows = [table.head, ["---"] + ["---:"] * (len(table.head) - 1), *table.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _judged(evaluation: dict[str, float]) -> list[str]:
    pairs = zip(JUDGED, _DIGITS, strict=True)
    return [f"{evaluation[name]:.{digits}f}" for name, digits in pairs]


def _when(evaluations: Evaluations, level: float) -> dict[str, float]:
    before = evaluations[0]
    for after in evaluations:
        if after["proxy"] >= level:
            gap = after["proxy"] - before["proxy"]
            t = (level - before["proxy"]) / gap if gap > 0 else 0.0
            return {name: before[name] + t * (after[name] - before[name]) for name in after}
        before = after
    raise ValueError(f"`level` is {level}; the run never reached it")


def _small(x: float) -> str:
    if abs(x) < 1e-9:  # float64 rounding of what is exactly 0
        return "0"
    return f"{x:.1e}" if abs(x) < 0.095 else f"{x:.2f}"


def _share(x: float) -> str:
    return f"{100 * x:.0f} %"
