"""The report's plots, as SVG that takes the page's colours, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..trainer.extras import require
from .runs import Group, Run

COLOURS = ("#3b7dd8", "#d9603b", "#2f9e6e", "#9b6bd3", "#b8860b", "#d1568f")
_INK, _GRID = "#010203", "#040506"  # stand for the page's own, which are put in afterwards
_STYLE = {
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "grid.color": _GRID,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "svg.fonttype": "none",
    "svg.hashsalt": "guard-ops",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_SIZE = (4.3, 2.7)  # inches: readable where it fills a telephone's width


class Figure(NamedTuple):
    title: str
    text: str  # what is to be seen
    svg: str


class Curve(NamedTuple):
    """A number over training: its key in the metrics, and what it is."""

    key: str
    title: str
    text: str


CURVES = (
    Curve("reward", "Reward", "What training maximizes, over the rollout."),
    Curve("gold", "Gold", "A reward that training never sees, on held-out prompts."),
    Curve("proxy", "Proxy", "The reward that is trained on, on the evaluation's samples."),
    Curve("held_out_proxy", "Proxy, held out", "The reward that is trained on, on gold's samples."),
    Curve(
        "gap",
        "Proxy minus gold",
        "By how much the proxy rose more than gold, in standard deviations of the start.",
    ),
    Curve("frechet", "Fréchet distance", "Of the samples' features: how far they have moved."),
    Curve("diversity", "Diversity", "Mean distance of two samples of a prompt."),
    Curve("duplicates", "Near-duplicates", "Share of samples with another one very near."),
    Curve("inception_score", "Inception score", "Sure of a class, and all classes: high."),
    Curve("evaluation_reward", "Evaluation reward", "On fixed prompts from fixed noise."),
    Curve("grad_norm", "Gradient norm", "Before it is clipped."),
)


def curves(groups: Sequence[Group]) -> list[Figure]:
    """Every number over training that a run has.

    Over several seeds: the mean and its 95 % t interval at iterations that all have. Of one run's
    gold: 1.96 standard errors of its samples.
    """
    found = []
    for curve in (*CURVES, *_parts(groups)):
        figure = _drawn(partial(_curve, groups=groups, key=curve.key))
        if figure is not None:
            found.append(Figure(curve.title, curve.text, figure))
    return found


def clips(groups: Sequence[Group]) -> list[Figure]:
    """Shares above and below the clip range at each step, on average over training."""
    texts = {
        "clip_fraction_high": ("Above the clip range", "% of transitions, mean over training."),
        "clip_fraction_low": ("Below the clip range", "% of transitions, mean over training."),
        "ratio_std": ("Spread of the raw ratio", "Per step, mean over training."),
        "ratio_hat_std": ("Spread after RatioNorm", "Per step, mean over training."),
    }
    found = []
    for key, (title, text) in texts.items():
        figure = _drawn(partial(_per_step, groups=groups, key=key))
        if figure is not None:
            found.append(Figure(title, text, figure))
    return found


def ratios(run: Run) -> list[tuple[int, list[Figure]]]:
    """Of each iteration that was kept, histograms per step before and after RatioNorm."""
    load = require("safetensors.numpy", "report").load_file
    found = []
    for iteration, path in run.ratios.items():
        kept = load(path)
        raw, normalized = kept["log_ratio"], kept["excess"]
        pictures = []
        for title, values, text in (
            ("Before RatioNorm: r - 1", _expm1(raw), "A row a trained step, the first at the top."),
            ("After RatioNorm", normalized, "The same transitions, as the clip sees them."),
        ):
            figure = _drawn(partial(_ridges, values=values))
            if figure is not None:
                pictures.append(Figure(title, text, figure))
        found.append((iteration, pictures))
    return found


def _parts(groups: Sequence[Group]) -> list[Curve]:
    keys = {
        key: None
        for group in groups
        for run in group.runs
        for key in run.lines[-1]
        if key.startswith("reward_") and key != "reward_std"
    }
    return [Curve(key, f"Reward: {key[7:]}", "A part of the reward.") for key in keys]


def _drawn(draw: Callable[[Any], bool]) -> str | None:
    """The SVG of what ``draw`` puts on axes; None if it says that there is nothing."""
    matplotlib = require("matplotlib", "report")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "report")
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=_SIZE)
        try:
            if not draw(axes):
                return None
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        finally:
            pyplot.close(figure)
    return _in_page(buffer.getvalue())


def _in_page(text: str) -> str:
    """The SVG element, as wide as its place, in the page's colours and with names of its own."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    _in_page.count += 1  # type: ignore[attr-defined]
    mark = f"f{_in_page.count}-"  # type: ignore[attr-defined]
    svg = re.sub(r'\bid="', f'id="{mark}', svg)
    svg = re.sub(r'(xlink:href|href)="#', rf'\1="#{mark}', svg)
    return re.sub(r"url\(#", f"url(#{mark}", svg)


_in_page.count = 0  # type: ignore[attr-defined]


def _curve(ax: Any, groups: Sequence[Group], key: str) -> bool:
    drawn = False
    for n, group in enumerate(groups):
        colour = COLOURS[n % len(COLOURS)]
        series = [_series(run, key) for run in group.runs]
        shared = sorted(set.intersection(*(set(each) for each in series)))
        if not shared:
            continue
        rows = [[each[i] for each in series] for i in shared]
        mean = [math.fsum(row) / len(row) for row in rows]
        half = [_half_width(row) for row in rows]
        if len(group.runs) == 1 and key == "gold" and group.runs[0].readings:
            errors = {r.iteration: _error(r.gold) for r in group.runs[0].readings}
            half = [1.96 * errors.get(i, 0.0) for i in shared]
        ax.plot(shared, mean, color=colour, label=group.label, marker="o", markersize=2.4)
        if any(half):
            low = [m - h for m, h in zip(mean, half, strict=True)]
            high = [m + h for m, h in zip(mean, half, strict=True)]
            ax.fill_between(shared, low, high, color=colour, alpha=0.18, linewidth=0)
        for run in group.runs:
            said = run.verdict
            if key == "gold" and said is not None and said.since is not None:
                ax.axvline(said.since, color=colour, linestyle=":", linewidth=1.3)
        drawn = True
    if drawn:
        ax.set_xlabel("iteration")
        ax.margins(x=0.02)
        if len(groups) > 1:
            ax.legend(fontsize=8)
    return drawn


def _series(run: Run, key: str) -> dict[int, float]:
    found = {
        line["iteration"]: float(line[key])
        for line in run.lines
        if isinstance(line.get(key), int | float)
    }
    if key in ("gold", "held_out_proxy") and run.readings and found:
        first = run.readings[0]  # of the start, which has no line in the metrics
        found = {first.iteration: first.mean if key == "gold" else first.proxy} | found
    return found


def _per_step(ax: Any, groups: Sequence[Group], key: str) -> bool:
    drawn, share = False, key.startswith("clip")
    for n, group in enumerate(groups):
        rows = [line[key] for run in group.runs for line in run.lines if _is_list(line.get(key))]
        rows = [row for row in rows if len(row) == len(rows[0])]
        if not rows:
            continue
        mean = [100**share * math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
        colour = COLOURS[n % len(COLOURS)]
        ax.plot(range(len(mean)), mean, color=colour, label=group.label, marker="o", markersize=3)
        drawn = True
    if drawn:
        ax.set_xlabel("trained step")
        if not share and any(line.get_ydata().max() > 0 for line in ax.get_lines()):
            ax.set_yscale("log")
        if len(groups) > 1:
            ax.legend(fontsize=8)
    return drawn


def _ridges(ax: Any, values: Any) -> bool:
    """A histogram a step, one below the other, on one scale."""
    np = require("numpy", "report")
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return False
    low, high = np.quantile(finite, [0.005, 0.995])
    if low == high:
        low, high = low - 1e-8, high + 1e-8
    edges = np.linspace(low, high, 41)
    middle = (edges[1:] + edges[:-1]) / 2
    steps = len(values)
    for k in range(steps):
        row = values[k][np.isfinite(values[k])]
        counts, _ = np.histogram(np.clip(row, low, high), edges)
        heights = 1.5 * counts / max(1, counts.max())
        base = steps - 1 - k
        ax.fill_between(middle, base, base + heights, color=COLOURS[0], alpha=0.45, linewidth=0)
        ax.plot(middle, base + heights, color=COLOURS[0], linewidth=0.9)
    ax.set_yticks([steps - 1 - k for k in range(steps)], [str(k) for k in range(steps)])
    ax.set_ylabel("trained step")
    ax.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3))
    ax.axvline(0, color=_INK, linewidth=0.8)
    return True


def _expm1(values: Any) -> Any:
    return require("numpy", "report").expm1(values)


def _half_width(row: Sequence[float]) -> float:
    """Of the 95 % t interval of a mean over seeds; 0 for one."""
    if len(row) < 2:
        return 0.0
    quantile = require("scipy.stats", "report").t.ppf(0.975, len(row) - 1)
    return float(quantile) * _error(row)


def _error(values: Sequence[float]) -> float:
    n = len(values)
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, int | float) for x in value)
