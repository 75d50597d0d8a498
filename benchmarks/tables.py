"""The saved rows as tables: what :mod:`benchmarks.report` and the console print."""

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


def workloads(rows: Rows) -> list[Table]:
    """A table for each workload: each contender's time, ratio to guard_ops, bandwidth, memory."""
    by_workload: dict[str, Rows] = {}
    for row in rows:
        by_workload.setdefault(row["workload"], []).append(row)
    return [_workload(found) for found in by_workload.values()]


def _workload(rows: Rows) -> Table:
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    gpu = _on_gpu(rows)
    columns = ["contender"]
    for dtype in dtypes:
        columns += [dtype, "times", *gpu, "of copy", "peak memory"]
    lines = []
    for label in _labels(rows):
        line = [label]
        for dtype in dtypes:
            found = next((r for r in rows if _label(r) == label and r["dtype"] == dtype), None)
            if found is None:
                line += ["", "", *("" for _ in gpu), "", ""]
                continue
            noise = found["noise"]
            times = "1" if found["base"] else _ratio(found["ratio"], noise)
            line += [_milliseconds(found), times, *(_gpu_time(found) for _ in gpu)]
            line += [_of_copy(found), mebibytes(found["peak_bytes"])]
        lines.append(line)
    first = rows[0]
    noises = dict.fromkeys(f"{r['dtype']} {r['noise']:.0%}" for r in rows)
    notes = [f"{_rounds(rows)} rounds; noise: {', '.join(noises)}."]
    if first["shape"] != first["recipe_shape"]:
        notes.append(
            f"Shrunk to this machine's budget: the recipe trains {_times(first['recipe_shape'])}."
        )
    return Table(
        f"{first['workload']}, latents {_times(first['shape'])}, {first['objective']}",
        columns,
        lines,
        notes=notes,
    )


def ops(rows: Rows) -> list[Table]:
    """A table for each op and dtype: every stage, form and mode."""
    groups: dict[tuple[str, str], list[dict[str, Row]]] = {}
    for found in _by_case(rows):
        first = next(iter(found.values()))
        groups.setdefault((first["op"], first["dtype"]), []).append(found)
    return [_op(op, dtype, found) for (op, dtype), found in groups.items()]


def _op(op: str, dtype: str, cases: list[dict[str, Row]]) -> Table:
    names = list(dict.fromkeys(r["contender"] for found in cases for r in found.values()))
    backends = [name for name in names if name != COPY]
    gpu = _on_gpu([row for found in cases for row in found.values()])
    columns = ["stage, form, mode", backends[0], *gpu, "bytes", "of copy", *backends[1:]]
    columns += ["peak memory"]
    lines = []
    for found in cases:
        by_name = {row["contender"]: row for row in found.values()}
        first = by_name[backends[0]]
        moved = first["floor_bytes"] // math.prod(first["shape"])
        parts = (first["stage"], first["form"], first["objective"])
        line = [", ".join(part for part in parts if part != "-"), _milliseconds(first)]
        line += [_gpu_time(first) for _ in gpu]
        line += [str(moved), _of_copy(first)] if moved else ["none left", ""]
        line += [_versus(by_name.get(name), first["noise"]) for name in backends[1:]]
        lines.append([*line, mebibytes(first["peak_bytes"])])
    shape = next(iter(cases[0].values()))["shape"]
    return Table(f"{op}, {dtype}, latents {_times(shape)}", columns, lines)


def accuracy(rows: Rows) -> list[Table]:
    """Errors of ``log r`` and ``r_hat``, and wrong clip decisions at the recipes' three clips."""
    clips = list(rows[0]["wrong_share"])
    names = list(dict.fromkeys(row["contender"] for row in rows))
    cells: list[tuple[str, Callable[[Row], str]]] = [
        ("error of log r, relative to the largest", lambda row: f"{row['log_ratio_error']:.1e}"),
        ("error of the standardized ratio", lambda row: f"{row['max_error']:.1e}"),
        (
            f"share of {rows[0]['batch']} clip decisions that are wrong, at {', '.join(clips)}",
            lambda row: ", ".join(f"{row['wrong_share'][clip]:.0%}" for clip in clips),
        ),
    ]
    tables = []
    for title, cell in cells:
        lines: dict[tuple[str, float], list[str]] = {}
        for row in rows:
            key = (row["dtype"], row["drift"])
            lines.setdefault(key, [row["dtype"], f"{row['drift']:.0e}"]).append(cell(row))
        tables.append(Table(title, ["dtype", "drift", *names], list(lines.values()), 2))
    return tables


def share(rows: Rows) -> list[Table]:
    """The share of a training step that the loss takes, without guard_ops and with it."""
    columns = ["model", "plain PyTorch", "guard_ops", "peak memory of the loss"]
    columns += ["of the step", "share at full width"]
    lines = [
        [
            f"{row['model']} {_times(row['shape'])}",
            *(_part_of_step(row, name) for name in ("before", "after")),
            *(
                f"{row[f'{what}_before_bytes'] / 2**20:.1f} -> "
                f"{mebibytes(row[f'{what}_after_bytes'])}"
                for what in ("loss_peak", "peak")
            ),
            " -> ".join(_full_share(row, name) for name in ("before", "after")),
        ]
        for row in rows
        if "skipped" not in row
    ]
    notes = [f"{row['model']}: skipped, {row['skipped']}." for row in rows if "skipped" in row]
    notes += [f"{row['model']}: {row['note']}" for row in rows if row.get("note")]
    return [Table("share of a training step", columns, lines, notes=notes)]


TABLES: dict[str, Callable[[Rows], list[Table]]] = {
    "workloads": workloads,
    "ops": ops,
    "accuracy": accuracy,
    "share": share,
}


def mebibytes(count: int | None) -> str:
    """``count`` bytes as text, such as ``8.0 MiB``; empty for None."""
    return "" if count is None else f"{count / 2**20:.1f} MiB"


def case_key(row: Row) -> tuple[object, ...]:
    """What the rows of one race have in common."""
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


def _on_gpu(rows: Rows) -> list[str]:
    """The column that only rows of a GPU have, for the device's own time."""
    return ["GPU time"] if any("gpu_milliseconds" in row for row in rows) else []


def _gpu_time(row: Row) -> str:
    return f"{row['gpu_milliseconds']:.3g} ms" if "gpu_milliseconds" in row else ""


def _of_copy(row: Row) -> str:
    """Bandwidth as a percentage of the race's copy's; on a GPU by the device's own times."""
    return f"{row.get('gpu_percent_of_copy', row['percent_of_copy']):.0f}%"


def _versus(row: Row | None, noise: float) -> str:
    return "" if row is None else f"{_milliseconds(row)} ({_ratio(row['ratio'], noise)})"


def _ratio(ratio: float, noise: float) -> str:
    """A ratio as text, such as ``2.0x``; a difference below the noise is a tie."""
    if abs(ratio - 1) <= noise:
        return "tie"
    return f"{ratio:.{1 if ratio >= 1.95 else 2}f}x"


def _times(shape: Iterable[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _rounds(rows: Rows) -> str:
    counts = sorted({row["rounds"] for row in rows})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _part_of_step(row: Row, name: str) -> str:
    loss, step = row[f"loss_{name}_ms"], row[f"step_{name}_ms"]
    return f"{loss:.3g} of {_digits(step)} ms ({loss / step:.2%})"


def _full_share(row: Row, name: str) -> str:
    """The share, estimated if the model was scaled: its time grows with its parameters."""
    loss, step = row[f"loss_{name}_ms"], row[f"step_{name}_ms"]
    if row["parameters"] == row["full_parameters"]:
        return f"{loss / step:.2%}"
    model = max(step - loss, 0) * row["full_parameters"] / row["parameters"]
    return f"about {100 * loss / (loss + model):.1g}%"


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
