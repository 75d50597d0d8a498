"""The study's figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guard_ops.trainer.extras import require

from .analysis import SETTINGS, Interval, Run, Seeds, per_step, seeds_of
from .runs import FIRST_SEED, OBJECTIVES, unpacked
from .words import SHAPE, WORDS

COLOURS = {"plain": "#c8452e", "paper": "#2a7f62", "article": "#2b5fa8"}
TITLES = {
    ("digits", "flow"): "digits, Flow-GRPO",
    ("digits", "dance"): "digits, DanceGRPO",
    ("text", "flow"): "text, Flow-GRPO",
    ("text", "dance"): "text, DanceGRPO",
}
_STYLE = {
    "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlelocation": "left", "axes.titlesize": 10, "figure.constrained_layout.use": True,
    "font.size": 9, "grid.alpha": 0.25, "legend.frameon": False, "savefig.dpi": 90,
}  # fmt: skip


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write ``ratio.png``, ``clip.png``, ``training.png``, ``paid.png``, ``words.png``."""
    matplotlib = require("matplotlib", "study")
    matplotlib.use("agg")
    pyplot, pillow = require("matplotlib.pyplot", "study"), require("PIL.Image", "study")
    places = {setting: found for setting in SETTINGS if (found := seeds_of(runs, *setting))}
    figures: dict[str, Callable[[], Any]] = {
        "ratio.png": lambda: _ratio(pyplot, places),
        "clip.png": lambda: _clip(pyplot, places),
        "training.png": lambda: _training(pyplot, places),
        "paid.png": lambda: _paid(pyplot, places),
        "words.png": lambda: _words(pyplot, places),
    }
    with pyplot.rc_context(_STYLE):
        for name, figure in figures.items():
            made = figure()
            made.savefig(folder / name, metadata={"Software": None})
            pyplot.close(made)
            with pillow.open(folder / name) as picture:  # a quarter of the bytes
                few = picture.convert("RGB").quantize(64)
            few.save(folder / name, optimize=True)
    return [folder / name for name in figures]


def _grid(pyplot: Any, places: dict[Any, Seeds], labels: Sequence[str], **shared: Any) -> Any:
    """A column for each setting, a row for each of ``labels``."""
    figure, axes = pyplot.subplots(
        len(labels), len(places), figsize=(12, 2.4 * len(labels) + 0.3), squeeze=False, **shared
    )
    for column, setting in enumerate(places):
        axes[0, column].set_title(TITLES[setting], fontweight="bold")
    for row, label in enumerate(labels):
        axes[row, 0].set_ylabel(label)
    return figure, axes


def _band(ax: Any, objective: str, x: Sequence[float], rows: Sequence[Sequence[float]]) -> None:
    """Mean and 95 % t interval over seeds, each a row."""
    found = [Interval.of(column) for column in zip(*rows, strict=True)]
    mean = [f.mean for f in found]
    ax.plot(x, mean, color=COLOURS[objective], label=objective, marker="o", markersize=3)
    if len(rows) > 1:
        low, high = [f.mean - f.half for f in found], [f.mean + f.half for f in found]
        ax.fill_between(x, low, high, color=COLOURS[objective], alpha=0.15, linewidth=0)


def _lines(ax: Any, objective: str, x: Sequence[float], rows: Sequence[Sequence[float]]) -> None:
    """Mean over seeds, and each of them."""
    for row in rows:
        ax.plot(x, row, color=COLOURS[objective], linewidth=0.7, alpha=0.5)
    mean = [sum(column) / len(column) for column in zip(*rows, strict=True)]
    ax.plot(x, mean, color=COLOURS[objective], label=objective, marker="o", markersize=3)


def _ratio(pyplot: Any, places: dict[Any, Seeds]) -> Any:
    names = {
        "ratio_bias": "raw: mean - 1", "ratio_std": "raw: spread",
        "ratio_hat_std": "normalized: spread",
    }  # fmt: skip
    figure, axes = _grid(pyplot, places, list(names.values()), sharex=True)
    for column, seeds in enumerate(places.values()):
        for row, name in enumerate(names):
            ax = axes[row, column]
            for objective in OBJECTIVES:
                if name == "ratio_hat_std" and objective == "plain":
                    continue  # it has no RatioNorm
                rows = [per_step(by[objective], name) for by in seeds.values()]
                _lines(ax, objective, range(len(rows[0])), rows)
            if row:
                ax.set_yscale("log")
            else:
                ax.axhline(0, color="black", linewidth=0.7)
                ax.set_yscale("symlog", linthresh=1e-5)
        axes[-1, column].set_xlabel("denoising step")
    axes[0, 0].legend(loc="lower left")
    return figure


def _clip(pyplot: Any, places: dict[Any, Seeds]) -> Any:
    labels = ("% above the clip", "% below the clip")
    figure, axes = _grid(pyplot, places, labels, sharex=True, sharey=True)
    for column, seeds in enumerate(places.values()):
        for row, name in enumerate(("clip_fraction_high", "clip_fraction_low")):
            for objective in OBJECTIVES:
                rows = [[100 * x for x in per_step(by[objective], name)] for by in seeds.values()]
                _band(axes[row, column], objective, range(len(rows[0])), rows)
        axes[-1, column].set_xlabel("denoising step")
    axes[0, 0].set_ylim(0, None)
    axes[0, 0].legend(loc="lower right")
    return figure


_JUDGED = {"proxy": "proxy ↑", "gold": "gold ↑", "frechet": "Fréchet ↓", "diversity": "diversity ↑"}


def _training(pyplot: Any, places: dict[Any, Seeds]) -> Any:
    figure, axes = _grid(pyplot, places, list(_JUDGED.values()), sharex="col")
    for column, seeds in enumerate(places.values()):
        for row, name in enumerate(_JUDGED):
            for objective in OBJECTIVES:
                readings = [by[objective]["evaluations"] for by in seeds.values()]
                x = [e["iteration"] for e in readings[0]]
                rows = [[e[name] for e in run] for run in readings]
                _lines(axes[row, column], objective, x, rows)
        axes[-1, column].set_xlabel("iteration")
    axes[0, 0].legend(loc="upper left")
    return figure


def _paid(pyplot: Any, places: dict[Any, Seeds]) -> Any:
    """What the proxy costs: each run a line from its start."""
    names = {name: label for name, label in _JUDGED.items() if name != "proxy"}
    figure, axes = _grid(pyplot, places, list(names.values()), sharex="col")
    for column, seeds in enumerate(places.values()):
        for row, name in enumerate(names):
            for n, by in enumerate(seeds.values()):
                for objective in OBJECTIVES:
                    readings = by[objective]["evaluations"]
                    x, y = [e["proxy"] for e in readings], [e[name] for e in readings]
                    label = None if n else objective
                    axes[row, column].plot(
                        x, y, color=COLOURS[objective], label=label, linewidth=1.2, alpha=0.8
                    )
        axes[-1, column].set_xlabel("proxy")
    axes[0, 0].legend(loc="lower left")
    return figure


def _words(pyplot: Any, places: dict[Any, Seeds]) -> Any:
    """The first seed's samples of ten words, from the same noise."""
    numpy = require("numpy", "study")
    rows = {}
    for task, sampler in places:
        by = places[task, sampler].get(FIRST_SEED)
        if task != "text" or by is None:
            continue
        rows[f"{sampler}: before"] = by["plain"]["samples"][0]
        rows |= {f"{sampler}: {name}": by[name]["samples"][1] for name in OBJECTIVES}
    figure, axes = pyplot.subplots(
        max(1, len(rows)), 1, figsize=(9, 0.36 * max(1, len(rows)) + 0.2), squeeze=False
    )
    for ax in axes[:, 0]:
        ax.axis("off")
    _, height, width = SHAPE
    for ax, (label, text) in zip(axes[:, 0], rows.items(), strict=False):
        images = 1 - numpy.array(unpacked(text)).reshape(-1, height, width)
        ax.imshow(numpy.hstack(images[: len(WORDS)]), cmap="gray", vmin=0, vmax=1, aspect="auto")
        ax.text(-0.01, 0.5, label, transform=ax.transAxes, ha="right", va="center")
    return figure
