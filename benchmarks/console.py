"""Tables and verdicts in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from guard_ops.trainer.extras import require

from . import tables
from .compare import Verdict
from .results import Machine

WIDTH = 110  # columns of a file or a pipe, which has no width of its own


def show(machine: Machine) -> None:
    """Print the sections' tables."""
    rich = require("rich.console", "bench")
    box = require("rich.box", "bench").SIMPLE_HEAD
    rich_table = require("rich.table", "bench").Table
    console = rich.Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = rich.Console(highlight=False, markup=False, width=WIDTH)
    for name, part in machine.items():
        for table in tables.TABLES[name](part["rows"]):
            shown = rich_table(box=box, padding=(0, 1, 0, 0), pad_edge=False)
            for i, column in enumerate(table.columns):
                shown.add_column(column, justify="left" if i < table.labels else "right")
            for row in table.rows:
                shown.add_row(*row)
            console.print(table.title, style="bold")
            console.print(shown)
            for note in table.notes:
                console.print(note)
            console.print()


def show_verdicts(verdicts: Sequence[Verdict]) -> int:
    """Print what changed, and how many did not; returns 1 if something is slower."""
    slower = sorted((v for v in verdicts if v.slower), key=lambda v: -v.change)
    faster = sorted((v for v in verdicts if v.faster), key=lambda v: v.change)
    for verdict in [*slower, *faster]:
        print(f"{verdict.name}: {verdict} (noise {verdict.threshold:.0%})")
    rest = len(verdicts) - len(slower) - len(faster)
    print(
        f"{len(slower)} slower, {len(faster)} faster, {rest} no change"
        if slower or faster
        else f"no change: {rest} kernels within the noise of the two runs"
    )
    return int(bool(slower))
