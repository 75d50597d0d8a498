"""The saved numbers as pictures, PNG and SVG: roofline, speed-up, accuracy over drift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guard_ops.trainer.extras import require

from .cases import COPY
from .results import Machine, Row
from .suite import CHAIN_FORM
from .workloads import WORKLOADS

# A contender has one colour in every picture: guard_ops' backends and forms are blues and greens,
# plain PyTorch is red, what torch.compile makes of it orange, a memory copy black.
COLOURS = {
    "cpu": "#1b6ca8",
    "triton": "#2a9d8f",
    "cuda": "#3c8f3c",
    "reference": "#8a8a8a",
    "eager": "#c0504d",
    "torch.compile": "#e0932f",
    "torch.compile max-autotune": "#a36a16",
}
LABELS = {"eager": "plain PyTorch"}
FORM_LOOKS = {
    "plain PyTorch": ("x-", COLOURS["eager"]),
    "guard_ops, velocity form": ("v-", "#1b6ca8"),
    "guard_ops, noise form": ("s--", "#0b3c5d"),
    "guard_ops, mean form": ("o-", "#6fb1de"),
}
MARKERS = {"mean": "o", "velocity": "v", "noise": "s", "seeded": "D", CHAIN_FORM: "x"}
EAGER = "eager"
COMPILED_DTYPE = "float32"  # cases.py: the only one in which torch.compile is raced


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
    """Useful bytes over time of each contender, under a memory copy's: a column for a workload."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    copied = {row["workload"]: row["floor_bytes"] for row in rows if row["contender"] == COPY}
    workloads = sorted(copied, key=lambda name: copied[name])
    places = {name: n for n, name in enumerate(workloads)}
    figure, panels = pyplot.subplots(
        len(dtypes), 1, figsize=(9.5, 4.2 * len(dtypes)), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    for axes, dtype in zip(panels[:, 0], dtypes, strict=True):
        shown = [row for row in rows if row["dtype"] == dtype]
        roofs = [row for row in shown if row["contender"] == COPY]
        axes.scatter(
            [places[row["workload"]] for row in roofs],
            [row["gigabytes_per_second"] for row in roofs],
            marker="_", s=700, linewidths=2.5, color="black", label="memory copy: the roof",
        )  # fmt: skip
        series: dict[tuple[str, str], list[Row]] = {}
        for row in shown:
            if row["contender"] != COPY:
                series.setdefault((row["contender"], row["form"]), []).append(row)
        for (contender, form), points in series.items():
            chain = form == CHAIN_FORM
            name = LABELS.get(contender, contender)
            axes.scatter(
                [places[row["workload"]] for row in points],
                [row["gigabytes_per_second"] for row in points],
                marker=MARKERS[form], s=42, color=COLOURS.get(contender, "black"),
                label=name if chain else f"guard_ops {name}, {form} form",
            )  # fmt: skip
        sizes = {row["workload"]: row["floor_bytes"] / 2**20 for row in roofs}
        titles = [_title(name).replace(" ", "\n", 1) for name in workloads]
        titles = [
            f"{title}\n({sizes[name]:.0f} MiB)" if name in sizes else title
            for name, title in zip(workloads, titles, strict=True)
        ]
        axes.set_xticks(range(len(workloads)), titles, fontsize=8)
        axes.set(
            ylabel="GB/s (higher is better)",
            title=f"{dtype}: bytes of one pass over time",
            yscale="log",
        )
        _plain_log_ticks(axes.yaxis)
        axes.grid(axis="y", which="both", alpha=0.15)
        axes.margins(x=0.05)
    _legend(figure, panels[:, 0], loc="outside upper center", ncols=4)
    return figure


def speed_up(pyplot: Any, rows: list[Row]) -> Any:
    """How many times as fast as plain PyTorch: a longer bar is faster."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(dtypes), figsize=(11, 6.4), layout="constrained", sharey=True, squeeze=False
    )
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        ratios = {
            (row["contender"], row["workload"]): row["ratio"]
            for row in rows
            if row["dtype"] == dtype and row["form"] in (CHAIN_FORM, "mean")
        }
        copies = {r["workload"]: r["ratio"] for r in rows
                  if r["dtype"] == dtype and r["contender"] == COPY}  # fmt: skip
        names = [name for name in dict.fromkeys(name for name, _ in ratios)
                 if name not in (EAGER, COPY, "reference")]  # fmt: skip
        height = 0.8 / max(len(names), 1)
        for i, name in enumerate(names):
            found = {w: ratios[EAGER, w] / ratios[name, w] for w in workloads
                     if (name, w) in ratios and (EAGER, w) in ratios}  # fmt: skip
            drawn = axes.barh(
                [workloads.index(w) + (i - (len(names) - 1) / 2) * height for w in found],
                list(found.values()),
                height * 0.92,
                color=COLOURS.get(name, "black"),
                label=name if name.startswith("torch.compile") else f"guard_ops {name}",
            )
            axes.bar_label(drawn, fmt="%.1fx", fontsize=8, padding=3)
        roofs = {w: ratios[EAGER, w] / ratio for w, ratio in copies.items() if (EAGER, w) in ratios}
        axes.scatter(
            list(roofs.values()), [workloads.index(w) for w in roofs], marker="|", s=260,
            linewidths=2, color="black", label="memory copy of the bytes of one pass",
        )  # fmt: skip
        axes.axvline(1, color=COLOURS[EAGER], linewidth=1.6, label="plain PyTorch")
        axes.set_yticks(range(len(workloads)), [_title(name) for name in workloads])
        axes.set(
            xlabel="times as fast as plain PyTorch: longer is faster", title=dtype, xlim=(0, None)
        )
        axes.margins(x=0.12)
        if not any(name.startswith("torch.compile") for name in names):
            note = f"torch.compile is raced in {COMPILED_DTYPE} only"
            axes.text(0.98, 0.015, note, transform=axes.transAxes, ha="right", fontsize=8,
                      color="#666666")  # fmt: skip
    panels[0][0].invert_yaxis()
    _legend(figure, panels[0], loc="outside upper center", ncols=5)
    return figure


def accuracy_over_drift(pyplot: Any, rows: list[Row]) -> Any:
    """Error of the log-ratio, and the share of wrong clips where anybody's is one."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    clips = list(rows[0]["wrong_share"])
    telling = [clip for clip in clips if any(row["wrong_share"][clip] for row in rows)]
    figure, panels = pyplot.subplots(
        1 + len(telling), len(dtypes), figsize=(10, 0.7 + 3.1 * (1 + len(telling))),
        layout="constrained", sharex=True, sharey="row", squeeze=False,
    )  # fmt: skip
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    contenders = dict.fromkeys(row["contender"] for row in rows)
    for column, dtype in zip(panels.T, dtypes, strict=True):
        for contender in contenders:
            style, colour = FORM_LOOKS.get(contender, ("o-", "black"))
            found = [r for r in rows if (r["contender"], r["dtype"]) == (contender, dtype)]
            drifts = [row["drift"] for row in found]
            look = {"color": colour, "label": contender, "markersize": 5}
            column[0].plot(drifts, [row["log_ratio_error"] for row in found], style, **look)
            for axes, clip in zip(column[1:], telling, strict=True):
                axes.plot(drifts, [100 * r["wrong_share"][clip] for r in found], style, **look)
                axes.grid(alpha=0.2)
        column[0].set(xscale="log", yscale="log", title=dtype)
        column[0].grid(alpha=0.2)
        column[-1].set_xlabel("drift of the velocity since the rollout")
    panels[0][0].set_ylabel("relative error of log r\n(lower is better)")
    for axes, clip in zip(panels[1:, 0], telling, strict=True):
        axes.set_ylabel(f"clip decisions at {clip}\nthat are wrong, % (lower is better)")
    silent = [clip for clip in clips if clip not in telling]
    if silent:
        axes = panels[-1][-1]
        note = f"at clip {' and '.join(silent)}: none of anybody's is wrong"
        axes.text(
            0.98, 0.95, note, transform=axes.transAxes, ha="right", va="top", fontsize=8,
            color="#666666",
        )  # fmt: skip
    _legend(figure, [panels[0][0]], loc="outside upper center", ncols=4)
    return figure


def _title(workload: str) -> str:
    """What a workload is called for people."""
    found = WORKLOADS.get(workload)
    return found.backbone.replace(", ", ",\n") if found else workload


def _legend(figure: Any, panels: Any, **place: Any) -> None:
    """One legend for all panels, each label once, in the order of the first that has it."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, fontsize=8, frameon=False, **place)


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
