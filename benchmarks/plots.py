"""The saved numbers as pictures, PNG and SVG: roofline, speed-up, accuracy over drift."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from guard_ops.trainer.extras import require

from .cases import COPY
from .results import Machine, Row
from .suite import CHAIN_FORM

COLOURS = {
    "cpu": "#1b6ca8",
    "triton": "#7a4fb5",
    "cuda": "#3c8f3c",
    "reference": "#8a8a8a",
    "eager": "#c0504d",
    "torch.compile": "#e0932f",
    "torch.compile max-autotune": "#a36a16",
}
FORM_LOOKS = {
    "plain PyTorch": ("x-", "#c0504d"),
    "guard_ops, velocity form": ("v-", "#1b6ca8"),
    "guard_ops, noise form": ("s-", "#3c8f3c"),
    "guard_ops, mean form": ("o-", "#e0932f"),
}
MARKERS = {"mean": "o", "velocity": "v", "noise": "s", "seeded": "D", CHAIN_FORM: "x"}


def draw(machine: Machine, folder: Path, prefix: str = "") -> list[Path]:
    """Write the plots that the machine's sections allow; returns the PNG and SVG file of each."""
    matplotlib = require("matplotlib", "bench")
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "guard-ops"  # the same numbers give the same file
    pyplot = require("matplotlib.pyplot", "bench")
    folder.mkdir(exist_ok=True)
    written = []
    for name, (section, plot) in PLOTS.items():
        if section not in machine:
            continue
        environment = machine[section]["environment"]
        figure = plot(pyplot, machine[section]["rows"])
        device = environment["cpu"] if environment["device"] == "cpu" else environment["device"]
        figure.text(
            0.995,
            0.005,
            f"{device}, {environment['threads']} threads, torch {environment['torch']}, "
            f"{environment['commit']}, {environment['date']}",
            ha="right",
            va="bottom",
            fontsize=7,
            color="#666666",
        )
        for kind in ("png", "svg"):
            path = folder / f"{prefix}{name}.{kind}"
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(path, dpi=130, metadata=metadata)
            written.append(path)
        pyplot.close(figure)
    return written


def roofline(pyplot: Any, rows: list[Row]) -> Any:
    """Achieved bandwidth (useful bytes over time) against the bytes a pass must move."""
    figure, axes = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    copies: dict[int, list[float]] = {}
    for row in rows:
        if row["contender"] == COPY:
            copies.setdefault(row["floor_bytes"], []).append(row["gigabytes_per_second"])
    axes.plot(
        [size / 2**20 for size in sorted(copies)],
        [statistics.median(copies[size]) for size in sorted(copies)],
        color="black",
        linewidth=1.2,
        label="memory copy of as many bytes",
    )
    series: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["contender"] != COPY:
            series.setdefault((row["contender"], row["form"], row["dtype"]), []).append(row)
    for (contender, form, dtype), points in series.items():
        colour, wide = COLOURS.get(contender, "black"), dtype == "float32"
        filled = colour if wide or form == CHAIN_FORM else "white"
        axes.scatter(
            [row["floor_bytes"] / 2**20 for row in points],
            [row["gigabytes_per_second"] for row in points],
            marker=MARKERS[form],
            s=38,
            linewidths=1.4 if form != CHAIN_FORM or wide else 0.7,
            color=filled if form != CHAIN_FORM else colour,
            edgecolors=None if form == CHAIN_FORM else colour,
            label=contender if form == CHAIN_FORM else f"{contender}, {form} form",
        )
    axes.set(
        xlabel="MiB that one pass must move (each operand read once, the gradient written once)",
        ylabel="those bytes per second, GB/s",
        title="Loss and gradient: achieved bandwidth against bytes",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _plain_log_ticks(axes.xaxis)
    _plain_log_ticks(axes.yaxis)
    axes.grid(which="both", alpha=0.15)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(reversed(labels), reversed(handles), strict=True))
    figure.legend(
        [once[label] for label in dict.fromkeys(labels)],
        list(dict.fromkeys(labels)),
        loc="outside right upper",
        fontsize=8,
        frameon=False,
        title="filled, bold: float32\nhollow, thin: bfloat16",
        title_fontsize=8,
        alignment="left",
    )
    return figure


def speed_up(pyplot: Any, rows: list[Row]) -> Any:
    """How many times as long as the first backend every plain-PyTorch contender takes."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    base = next(row["contender"] for row in rows if row["base"])
    figure, panels = pyplot.subplots(
        1, len(dtypes), figsize=(11, 6.4), layout="constrained", sharey=True, squeeze=False
    )
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        shown = [r for r in rows if r["dtype"] == dtype]
        workloads = list(dict.fromkeys(row["workload"] for row in shown))
        names = [
            name
            for name in dict.fromkeys(row["contender"] for row in shown)
            if name not in (base, COPY)
        ]
        height = 0.8 / max(len(names), 1)
        for i, name in enumerate(names):
            found = {
                row["workload"]: row
                for row in shown
                if row["contender"] == name and row["form"] in (CHAIN_FORM, "mean")
            }
            places = [w + (i - (len(names) - 1) / 2) * height for w in range(len(workloads))]
            bars = [(p, found[w]["ratio"]) for p, w in zip(places, workloads, strict=True)
                    if w in found]  # fmt: skip
            drawn = axes.barh(
                [p for p, _ in bars],
                [ratio for _, ratio in bars],
                height * 0.92,
                color=COLOURS.get(name, "black"),
                label=name,
            )
            axes.bar_label(drawn, fmt="%.1f", fontsize=7, padding=2)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(workloads)), workloads)
        axes.set(xlabel=f"times the time of guard_ops ({base}, mean form)", title=dtype)
        axes.margins(x=0.1)
    panels[0][0].invert_yaxis()
    handles: dict[str, Any] = {}
    for axes in panels[0]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles, loc="outside upper center", ncols=4, fontsize=9, frameon=False
    )
    return figure


def accuracy_over_drift(pyplot: Any, rows: list[Row]) -> Any:
    """Error of the log-ratio and share of wrong clips, with a column for each dtype."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    clips = list(rows[0]["wrong_share"])
    figure, panels = pyplot.subplots(
        1 + len(clips),
        len(dtypes),
        figsize=(10, 10.5),
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    figure.get_layout_engine().set(rect=(0, 0.02, 1, 0.98))
    contenders = dict.fromkeys(row["contender"] for row in rows)
    for column, dtype in zip(panels.T, dtypes, strict=True):
        for contender in contenders:
            style, colour = FORM_LOOKS.get(contender, ("o-", "black"))
            found = [r for r in rows if (r["contender"], r["dtype"]) == (contender, dtype)]
            drifts = [row["drift"] for row in found]
            look = {"color": colour, "label": contender, "markersize": 5}
            column[0].plot(drifts, [row["log_ratio_error"] for row in found], style, **look)
            for axes, clip in zip(column[1:], clips, strict=True):
                axes.plot(drifts, [100 * r["wrong_share"][clip] for r in found], style, **look)
                axes.set(ylim=(-4, 104))
                axes.grid(alpha=0.2)
        column[0].set(xscale="log", yscale="log", title=dtype)
        column[0].grid(alpha=0.2)
        column[-1].set_xlabel("drift of the velocity since the rollout")
    panels[0][0].set_ylabel("error of log r, relative")
    for axes, clip in zip(panels[1:, 0], clips, strict=True):
        axes.set_ylabel(f"wrong decisions\nat clip {clip}, %")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    return figure


def _plain_log_ticks(axis: Any) -> None:
    """Writes an axis's ticks as 1, 10, 100 rather than as powers."""
    ticker = require("matplotlib.ticker", "bench")
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


PLOTS: dict[str, tuple[str, Any]] = {
    "roofline": ("workloads", roofline),
    "speed_up": ("workloads", speed_up),
    "accuracy": ("accuracy", accuracy_over_drift),
}
