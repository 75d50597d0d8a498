"""``python -m benchmarks.report``: the saved numbers as tables and plots in the documents.

Tables go between ``<!-- begin:NAME -->`` and ``<!-- end:NAME -->`` of README.md and
docs/benchmarks.md, NAME being a key of ``PLACES``; nothing else of a document is touched. Plots go
to docs/benchmarks/. ``--check`` writes nothing and exits with 1 if a document is not what the saved
numbers say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import plots, results, tables
from .device_bounds import bounds
from .tables import Table

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/benchmarks.md")
PLOTS = "docs/benchmarks"
COMMANDS = {"device": "make gpu-check"}  # what measures a section,
COMMAND = "make bench"  # and what measures the others

Rows = list[dict[str, Any]]


def main(
    arguments: Sequence[str] | None = None, root: Path = ROOT, saved: Path = results.FOLDER
) -> int:
    """Write the tables; returns 0, or with ``--check`` 1 if a document is out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether all is up to date")
    check = parser.parse_args(arguments).check
    machines = results.load(saved)
    rendered = render(machines)
    stale = False
    for name in DOCUMENTS:
        path = root / name
        if not path.exists():
            print(f"{name}: absent, skipped")
            continue
        text = path.read_text()
        new = fill(text, rendered)
        if new == text:
            print(f"{name}: up to date")
        elif check:
            print(f"{name}: out of date; run python -m benchmarks.report")
            stale = True
        else:
            path.write_text(new)
            print(f"{name}: written")
    if not check and (root / PLOTS).parent.is_dir():
        for label, machine in machines.items():
            for path in plots.draw(machine, root / PLOTS, f"{label}-"):
                print(f"{path.relative_to(root)}: written")
    return int(stale)


def render(machines: dict[str, results.Machine]) -> dict[str, str]:
    """Place -> Markdown, from what :func:`benchmarks.results.load` returns."""
    rendered = {}
    for place, sections in PLACES.items():
        parts = []
        for label, machine in machines.items():
            found = [(name, table) for name, table in sections if name in machine]
            if found:
                first = found[0][0]
                command = COMMANDS.get(first, COMMAND)
                parts.append(_heading(label, machine[first]["environment"], command))
            parts += [table(machine[name]["rows"]) for name, table in found]
            pictures = PICTURES.get(place, ()) if found else ()
            parts += [
                f"![{name.replace('_', ' ')}, {label}](benchmarks/{label}-{name}.svg)"
                for name in pictures
            ]
        rendered[place] = "\n\n".join(parts) or "No saved results."
    return {"machines": _machines(machines), **rendered}


def _machines(machines: dict[str, results.Machine]) -> str:
    """Says of which machines there are results, and whether one of them is a GPU."""
    devices = {
        label: {part["environment"].get("device", "cpu") for part in machine.values()}
        for label, machine in machines.items()
    }
    text = f"Results of: {', '.join(devices)}." if devices else "No saved results."
    gpu = any(found != {"cpu"} for found in devices.values())
    return text if gpu else f"{text} GPU results are missing: none has been measured."


def fill(text: str, rendered: dict[str, str]) -> str:
    """``text`` with every marked place filled; a place it does not have is no error.

    Raises:
        ValueError: a place has a begin without an end, or an end without a begin.
    """
    for name, table in rendered.items():
        begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
        if (begin in text) != (end in text):
            raise ValueError(f"{begin} and {end} must both be in the document or neither")
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def speed_table(rows: Rows) -> str:
    """Time of every contender, and how many times guard_ops' time that is."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    cases: dict[str, dict[str, Any]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["contender"]] = row
    lines = [_line("loss and gradient", *names), _line("---", *["---:"] * len(names))]
    for case, found in cases.items():
        lines.append(_line(case, *(_time(found.get(name)) for name in names)))
    noise = ", ".join(f"{case} {found['guard_ops']['noise']:.0%}" for case, found in cases.items())
    lines += [
        "",
        f"Median of {rows[0]['rounds']} interleaved rounds on latents {rows[0]['shape']}; in "
        "brackets how many times guard_ops' time that is, the median of the rounds' ratios. Noise "
        f"(guard_ops timed twice in each round): {noise}; a smaller difference is a tie.",
    ]
    return "\n".join(lines)


def memory_table(rows: Rows) -> str:
    """Bytes that a case moves, the operators it takes and the memory it needs."""
    lines = [
        _line(
            "loss and gradient",
            "guard_ops, bytes per element",
            "eager, bytes per element",
            "eager, operators over whole latents",
            "guard_ops, peak extra memory",
            "eager, peak extra memory",
        ),
        _line("---", *["---:"] * 5),
    ]
    for row in rows:
        lines.append(
            _line(
                row["case"],
                str(row["bytes_per_element"]),
                str(row["eager_bytes_per_element"]),
                f"{row['eager_whole_latent_operators']} of {row['eager_operators']}",
                _mebibytes(row["peak_bytes"]),
                _mebibytes(row["eager_peak_bytes"]),
            )
        )
    return "\n".join(lines)


def tails_table(rows: Rows) -> str:
    """Time of each framework's block, of its one-call tail and of guard_loss alone."""
    head = ("script's block, loss and gradient", "original", "one-call tail", "times faster",
            "guard_loss", "share of its speed-up", "noise")  # fmt: skip
    lines = [_line(*head), _line("---", *["---:"] * (len(head) - 1))]
    for row in rows:
        times = [f"{row[f'{name}_ms']:.2f} ms" for name in ("original", "tail", "guard_loss")]
        faster, share = f"{row['times_faster']:.1f}", f"{row['share']:.0%}"
        lines.append(
            _line(row["block"], times[0], times[1], faster, times[2], share, f"{row['noise']:.0%}")
        )
    lines += ["", f"Median of {rows[0]['rounds']} interleaved rounds on {rows[0]['shape']}."]
    return "\n".join(lines)


def accuracy_table(rows: Rows) -> str:
    """Max error of ``r_hat`` and wrong clips of every contender, a row per dtype and drift."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    cells = {(r["dtype"], r["drift"], r["contender"]): r for r in rows}
    lines = [_line("dtype", "drift", *names), _line("---", "---:", *["---:"] * len(names))]
    for dtype, drift in dict.fromkeys((row["dtype"], row["drift"]) for row in rows):
        found = (cells.get((dtype, drift, name)) for name in names)
        lines.append(_line(dtype, f"{drift:.0e}", *(_error(row) for row in found)))
    lines += [
        "",
        "Largest error of the standardized ratio against float64; in brackets the clip decisions "
        f"(of {rows[0]['batch']}) that differ from float64's.",
    ]
    return "\n".join(lines)


def front_speed_table(rows: Rows) -> str:
    """The README's: what each case takes, in the columns that a first look needs."""
    names = {"guard_ops": "Guard Ops", "eager": "plain PyTorch", "torch.compile": "torch.compile"}
    cases: dict[str, dict[str, Any]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["contender"]] = row
    lines = [_line("loss and gradient", *names.values()), _line("---", *["---:"] * len(names))]
    for case, found in cases.items():
        lines.append(_line(case, *(_time(found.get(name)) for name in names)))
    shape = f"latents {rows[0]['shape']}"
    median = "the median of the rounds' ratios"
    return "\n".join([*lines, "", f"On {shape}; in brackets, times Guard Ops' time, {median}."])


def front_accuracy_table(rows: Rows) -> str:
    """The README's: float32, plain PyTorch against the velocity form."""
    names = {
        "plain PyTorch": "plain PyTorch",
        "guard_ops, velocity form": "Guard Ops, velocity form",
    }
    cells = {(r["drift"], r["contender"]): r for r in rows if r["dtype"] == "float32"}
    head = _line("drift of the velocity", *names.values())
    lines = [head, _line("---:", *["---:"] * len(names))]
    for drift in dict.fromkeys(drift for drift, _ in cells):
        found = (cells.get((drift, name)) for name in names)
        lines.append(_line(f"{drift:.0e}", *(_error(row) for row in found)))
    lines += [
        "",
        "Largest error of the standardized float32 ratio against float64; in brackets the clip "
        f"decisions (of {rows[0]['batch']}) that it turns. At the smallest drift the ratio spreads "
        "less than `std_floor`, and nothing is standardized.",
    ]
    return "\n".join(lines)


def device_table(rows: Rows) -> str:
    """Loss and gradient on a GPU: a table for each shape and dtype, then the bounds missed."""
    groups: dict[tuple[str, str], Rows] = {}
    for row in rows:
        shape = "[" + ", ".join(map(str, row["shape"])) + "]"
        groups.setdefault((shape, row["dtype"]), []).append(row)
    columns = ["contender", "form", "objective", "path", "graph replay", "without autograd"]
    columns += ["on cold inputs", "as called", "of copy", "moved, of copy"]
    parts = []
    for (shape, dtype), found in groups.items():
        lines = [f"**{shape}, {dtype}**", "", _line(*columns)]
        lines.append(_line(*["---"] * 4, *["---:"] * 6))
        lines += [_line(*_device_cells(row)) for row in found]
        parts.append("\n".join(lines))
    backends = [n for n in ("triton", "cuda") if any(row["contender"] == n for row in rows)]
    missed = bounds(rows, backends)
    parts.append("\n".join(f"- Not as asked: {text}" for text in missed) or "All is as asked.")
    return "\n\n".join(parts)


def _device_cells(row: dict[str, Any]) -> list[str]:
    def microseconds(name: str) -> str:
        return f"{row[name]:.1f} us" if name in row else ""

    path = row.get("path", "")
    if "ran" in row and path == "chosen":
        path = f"chosen: {row['ran']}"
    shares = ("share_of_copy", "moved_share_of_copy")
    replay = microseconds("microseconds")
    if "error" in row:
        replay = f"{replay} failed: {row['error'].replace('|', '/')}".strip()
    cells = [row["contender"], row["form"], row["objective"], path, replay]
    return [
        *cells,
        microseconds("loss_and_grad_microseconds"),
        microseconds("cold_microseconds"),
        microseconds("as_called_microseconds"),
        *(f"{row[name]:.0%}" if name in row else "" for name in shares),
    ]


def markdown(section: str) -> Callable[[Rows], str]:
    """A section's tables of :mod:`benchmarks.tables`, with titles and notes."""
    return lambda rows: "\n\n".join(_markdown(table) for table in tables.TABLES[section](rows))


def _markdown(table: Table) -> str:
    right = len(table.columns) - table.labels
    lines = [f"**{table.title}**", "", _line(*table.columns)]
    lines.append(_line(*["---"] * table.labels, *["---:"] * right))
    lines += [_line(*row) for row in table.rows]
    lines += [f"\n{note}" for note in table.notes]
    return "\n".join(lines)


# Place in a document -> the sections of a machine that it shows, and what renders each of them.
PLACES: dict[str, tuple[tuple[str, Callable[[Rows], str]], ...]] = {
    "front": (("speed", front_speed_table), ("accuracy", front_accuracy_table)),
    "speed": (("speed", speed_table), ("memory", memory_table)),
    "accuracy": (("accuracy", accuracy_table),),
    "workloads": (("workloads", markdown("workloads")),),
    "ops": (("ops", markdown("ops")),),
    "accuracy_details": (("accuracy", markdown("accuracy")),),
    "share": (("share", markdown("share")),),
    "tails": (("tails", tails_table),),
    "device": (("device", device_table),),
}
PICTURES = {"workloads": ("speed_up", "roofline"), "accuracy_details": ("accuracy",)}


def _heading(label: str, environment: dict[str, Any], command: str) -> str:
    e = environment
    what = f"{e['cpu']}, {e['cores']} cores, {e['threads']} threads, {e['isa']}"
    if e.get("device", "cpu") != "cpu":
        what = ", ".join([e["device"], *_versions(e)])
    return (
        f"**{label}**: {what}, torch {e['torch']}, commit {e['commit']}, {e['date']} (`{command}`)"
    )


def _versions(environment: dict[str, Any]) -> list[str]:
    """The driver, Triton and copy bandwidth of a GPU, as far as the section has them."""
    named = [f"{n} {environment[n]}" for n in ("driver", "triton") if environment.get(n)]
    copy = environment.get("copy_gigabytes_per_second")
    return [*named, *([f"a copy {copy:.0f} GB/s"] if copy else [])]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _time(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    time, ratio = f"{row['milliseconds']:.2f} ms", row["times_ours"]
    if row["contender"] == "guard_ops":
        return time
    tie = abs(ratio - 1) <= row["noise"]
    return f"{time} ({'tie' if tie else f'{ratio:.{1 if ratio >= 1.95 else 2}f}x'})"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _error(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['max_error']:.1e} ({row['wrong_clips']})"


if __name__ == "__main__":
    sys.exit(main())
