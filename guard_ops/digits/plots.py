"""The demo's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..trainer.extras import require
from .policy import CLASSES, SHAPE, Digits
from .results import SeedResult
from .tables import LABELS, step_means

COLOURS = {"flow_grpo": "#c8452e", "paper": "#2a7f62", "article": "#2b5fa8"}
MARKERS = {"flow_grpo": "o", "paper": "s", "article": "D"}
_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "savefig.dpi": 140,
}


def draw(result: SeedResult, digits: Digits, out: Path) -> list[Path]:
    """Write ``ratio.png``, ``clip.png``, ``overoptimization.png``, ``samples.png`` into ``out``."""
    matplotlib = require("matplotlib", "demo")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "demo")
    pictures = {
        "ratio.png": _ratio,
        "clip.png": _clip,
        "overoptimization.png": _overoptimization,
        "samples.png": _samples,
    }
    with pyplot.rc_context(_STYLE):
        for name, picture in pictures.items():
            figure = picture(pyplot, result, digits)
            figure.savefig(out / name)
            pyplot.close(figure)
    return [out / name for name in pictures]


def _ratio(pyplot: Any, result: SeedResult, digits: Digits) -> Any:
    """Mean and spread of the ratio per step, before and after RatioNorm."""
    figure, axes = pyplot.subplots(2, 2, figsize=(9.5, 6.2), sharex=True)
    panels = {
        (0, 0): ("ratio_bias", "Raw ratio: mean - 1"),
        (0, 1): ("ratio_hat_bias", "After RatioNorm (Flow-GRPO has none): mean - 1"),
        (1, 0): ("ratio_std", "Raw ratio: spread"),
        (1, 1): ("ratio_hat_std", "After RatioNorm (Flow-GRPO has none): spread"),
    }
    for place, (name, title) in panels.items():
        ax = axes[place]
        for objective, run in result.runs.items():
            _line(ax, objective, step_means(run, name))
        ax.set_title(title)
        if place[0] == 0:
            ax.axhline(0, color="black", linewidth=0.8)
            ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        else:
            ax.set_yscale("log")
            ax.set_xlabel("denoising step")
    for row in axes:
        low = min(ax.get_ylim()[0] for ax in row)
        high = max(ax.get_ylim()[1] for ax in row)
        for ax in row:
            ax.set_ylim(low, high)  # the same scale before and after
    axes[0, 0].legend(loc="lower left")
    return figure


def _clip(pyplot: Any, result: SeedResult, digits: Digits) -> Any:
    """Share of samples above the clip, per step."""
    figure, ax = pyplot.subplots(figsize=(6.4, 4.2))
    for objective, run in result.runs.items():
        _line(ax, objective, [100 * x for x in step_means(run, "clip_fraction_high")])
    ax.set_title("Samples above the clip range: flat is the goal")
    ax.set_xlabel("denoising step")
    ax.set_ylabel("% of samples")
    ax.set_ylim(0, None)
    ax.legend(loc="lower right")
    return figure


def _overoptimization(pyplot: Any, result: SeedResult, digits: Digits) -> Any:
    """The proxy over training, and what the samples are worth meanwhile."""
    figure, axes = pyplot.subplots(2, 2, figsize=(9.5, 6.4))
    panels = {
        "proxy": "Proxy reward ↑  (trained on)",
        "gold": "Gold ↑  (never seen)",
        "frechet": "Fréchet distance to real digits ↓",
        "diversity": "Diversity within a class ↑",
    }
    for ax, (name, title) in zip(axes.flat, panels.items(), strict=True):
        for objective, run in result.runs.items():
            x = [e["iteration"] for e in run.evaluations]
            _line(ax, objective, [e[name] for e in run.evaluations], x)
        ax.set_title(title)
        ax.set_xlabel("iteration")
    axes[0, 0].legend(loc="upper left")
    return figure


def _samples(pyplot: Any, result: SeedResult, digits: Digits) -> Any:
    """Real digits and samples from the same noise: a class a row."""
    real = [digits.images[digits.labels == label][:8] for label in range(CLASSES)]
    grids = {"Real": [image for row in real for image in row], "Before": list(result.start)}
    grids |= {LABELS[name]: list(run.samples) for name, run in result.runs.items()}
    figure, axes = pyplot.subplots(1, len(grids), figsize=(13.5, 3.75))
    figure.get_layout_engine().set(wspace=0.03)
    for ax, (title, images) in zip(axes, grids.items(), strict=True):
        ax.imshow(_grid(images), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(title)
        ax.axis("off")
    return figure


def _grid(images: list[Tensor]) -> Any:
    """Images, 8 a row, with a pixel of paper between them."""
    rows, (_, height, width) = len(images) // 8, SHAPE
    canvas = images[0].new_full((rows * (height + 1) - 1, 8 * (width + 1) - 1), -1.0)
    for n, image in enumerate(images):
        top, left = n // 8 * (height + 1), n % 8 * (width + 1)
        canvas[top : top + height, left : left + width] = image[0].clamp(-1, 1)
    return canvas.numpy()


def _line(ax: Any, objective: str, y: list[float], x: list[float] | None = None) -> None:
    ax.plot(
        range(len(y)) if x is None else x,
        y,
        color=COLOURS[objective],
        marker=MARKERS[objective],
        label=LABELS[objective],
    )
