"""The saved rows as tables; how they are printed is :mod:`benchmarks.report`'s and the console's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .cases import COPY
from .results import Row

Rows = list[Row]


@dataclass(frozen=True)
class Table:
    """Cells of text; the first ``labels`` columns name a row, the others hold its numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    labels: int = 1
    notes: list[str] = field(default_factory=list)


def workloads(rows: Rows) -> Table:
    """Time of every contender on every workload, and how many times guard_ops' it is."""
    cases = _by_case(rows)
    labels = _labels(rows)
    base = labels[0]
    columns = ["workload", "latents [K, B, ...]", "dtype", "objective", base]
    columns += ["of copy", *labels[1:], f"peak memory, {base}", "peak memory, eager", "noise"]
    lines = []
    for found in cases:
        first = found[base]
        line = [first["workload"], _shape(first), first["dtype"], first["objective"]]
        line += [_milliseconds(first), f"{first['percent_of_copy']:.0f}%"]
        line += [_versus(found.get(label), first["noise"]) for label in labels[1:]]
        eager = next((row for row in found.values() if row["contender"] == "eager"), None)
        line += [mebibytes(first["peak_bytes"]), mebibytes(eager and eager["peak_bytes"])]
        lines.append([*line, f"{first['noise']:.0%}"])
    return Table(
        "loss and gradient of the named workloads",
        columns,
        lines,
        4,
        [
            *_shrunk(rows),
            f"Median of {_rounds(rows)} interleaved rounds; in brackets how many times the time of "
            f"`{base}` that is, the median of the rounds' ratios. A difference below the noise "
            f"(`{base}` timed twice in each round) is a tie. `of copy`: bytes that one pass must "
            "move, per second, against a memory copy in the same race.",
        ],
    )


def ops(rows: Rows) -> Table:
    """Every op, stage, form and mode: time, bytes against the floor, memory."""
    backends = list(dict.fromkeys(r["contender"] for r in rows if r["contender"] != COPY))
    base = backends[0]
    columns = ["op", "stage", "form", "objective", "dtype", base, "bytes per element", "of copy"]
    columns += [*backends[1:], COPY, f"peak memory, {base}", "noise"]
    lines = []
    for found in _by_case(rows):
        by_name = {row["contender"]: row for row in found.values()}
        first = by_name[base]
        moved = first["floor_bytes"] // math.prod(first["shape"])
        line = [first[key] for key in ("op", "stage", "form", "objective", "dtype")]
        line += [_milliseconds(first), str(moved) if moved else "none left"]
        line += [f"{first['percent_of_copy']:.0f}%" if moved else ""]
        others = [*backends[1:], COPY] if moved else backends[1:]
        line += [_versus(by_name.get(name), first["noise"]) for name in others]
        line += [] if moved else [""]
        lines.append([*line, mebibytes(first["peak_bytes"]), f"{first['noise']:.0%}"])
    shape = rows[0]["shape"]
    return Table(
        f"every op on {rows[0]['workload']}, latents {shape}",
        columns,
        lines,
        5,
        [
            f"Latents {shape}. `forward` runs without a gradient; `backward` alone follows a "
            "forward that is not timed; guard_loss has written its gradient by then and only hands "
            "it out. Bytes per element: each operand read once, each result written once.",
        ],
    )


def accuracy_clips(rows: Rows) -> Table:
    """Error of ``log r`` and wrong clip decisions at three clips, per contender, dtype, drift."""
    clips = list(rows[0]["wrong_share"])
    columns = ["dtype", "drift", "contender", "error of log r", "error of r_hat"]
    lines = [
        [
            row["dtype"],
            f"{row['drift']:.0e}",
            row["contender"],
            f"{row['log_ratio_error']:.1e}",
            f"{row['max_error']:.1e}",
            *(f"{row['wrong_share'][clip]:.0%}" for clip in clips),
        ]
        for row in rows
    ]
    return Table(
        "accuracy against float64",
        [*columns, *(f"wrong clips, {clip}" for clip in clips)],
        lines,
        3,
        [
            "Largest error of the log-ratio, relative to the largest log-ratio, and of the "
            "standardized ratio; share of the "
            f"{rows[0]['batch']} clip decisions that differ from float64's.",
        ],
    )


def share(rows: Rows) -> Table:
    """How much of a training step the loss is, before and after."""
    columns = ["model", "latents", "step, before", "loss, before", "step, after", "loss, after"]
    columns += ["peak memory, before", "peak memory, after", "share at full width, before"]
    lines = [
        [
            row["model"],
            _times(row["shape"]),
            f"{row['step_before_ms']:.1f} ms",
            f"{row['loss_before_ms']:.2f} ms ({row['loss_before_ms'] / row['step_before_ms']:.2%})",
            f"{row['step_after_ms']:.1f} ms",
            f"{row['loss_after_ms']:.2f} ms ({row['loss_after_ms'] / row['step_after_ms']:.2%})",
            mebibytes(row["peak_before_bytes"]),
            mebibytes(row["peak_after_bytes"]),
            _estimate(row),
        ]
        for row in rows
        if "skipped" not in row
    ]
    notes = [f"{row['model']}: skipped, {row['skipped']}" for row in rows if "skipped" in row]
    notes += [f"{row['model']}: {row['note']}" for row in rows if row.get("note")]
    return Table("share of a training step", columns, lines, 2, notes)


TABLES: dict[str, Callable[[Rows], Table]] = {
    "workloads": workloads,
    "ops": ops,
    "accuracy": accuracy_clips,
    "share": share,
}


def mebibytes(count: int | None) -> str:
    """``8.0 MiB``; nothing for None."""
    return "" if count is None else f"{count / 2**20:.1f} MiB"


def case_key(row: Row) -> tuple[object, ...]:
    """What the contenders of one race share; a case's own form is that of its first row."""
    return tuple(row[key] for key in ("workload", "op", "stage", "objective", "dtype", "case"))


def _by_case(rows: Rows) -> list[dict[str, Row]]:
    cases: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(case_key(row), {})[_label(row)] = row
    return list(cases.values())


def _label(row: Row) -> str:
    plain = row["form"] in ("-", "log-prob") and row["op"] == "guard_loss"
    return str(row["contender"]) + ("" if plain else f", {row['form']} form")


def _labels(rows: Rows) -> list[str]:
    """Column order: contenders as they first come, the copy last."""
    labels = dict.fromkeys(_label(row) for row in rows)
    return [label for label in labels if label != COPY] + [COPY]


def _milliseconds(row: Row) -> str:
    return f"{row['milliseconds']:.3g} ms"


def _versus(row: Row | None, noise: float) -> str:
    if row is None:
        return ""
    ratio = row["ratio"]
    if abs(ratio - 1) <= noise:
        return f"{_milliseconds(row)} (tie)"
    return f"{_milliseconds(row)} ({ratio:.{1 if ratio >= 1.95 else 2}f}x)"


def _times(shape: Iterable[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _shape(row: Row) -> str:
    """The shape timed, with the recipe's K and B where they are more than this machine's share."""
    text = _times(row["shape"])
    if row["shape"] != row["recipe_shape"]:
        text += f" of [{row['recipe_shape'][0]}, {row['recipe_shape'][1]}]"
    return text


def _shrunk(rows: Rows) -> list[str]:
    names = dict.fromkeys(r["workload"] for r in rows if r["shape"] != r["recipe_shape"])
    if not names:
        return []
    return [
        f"Shrunk to what this machine's run has memory and time for: {', '.join(names)}. `of "
        "[K, B]` is what the recipe trains at a time; the latents are whole."
    ]


def _rounds(rows: Rows) -> str:
    counts = sorted({row["rounds"] for row in rows})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _estimate(row: Row) -> str:
    share_now = row["loss_before_ms"] / row["step_before_ms"]
    factor = row["full_parameters"] / row["parameters"]
    if factor == 1:
        return f"{share_now:.2%} (measured)"
    rest = (1 - share_now) * factor
    return f"about {share_now / (share_now + rest):.3%} (estimated)"
