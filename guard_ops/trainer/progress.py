"""Progress: a bar in a terminal, and lines where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .extras import require

SECONDS = 30.0  # between two lines


@contextmanager
def progress_bar(title: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Yields ``update(done, text)``.

    Without a terminal (a log file, a cluster's job) it prints a line at the first update, every
    :data:`SECONDS`, and at the end.
    """
    if not require("rich.console", "train").Console(file=sys.stdout).is_terminal:
        yield _lines(title, total, done)
        return
    rich = require("rich.progress", "train")
    columns = (
        rich.TextColumn("{task.description:<28}"),
        rich.BarColumn(bar_width=24),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.fields[text]}"),
    )
    with rich.Progress(*columns) as bar:
        task = bar.add_task(title, total=total, completed=done, text="")
        yield lambda done, text: bar.update(task, completed=done, text=text)


def _lines(title: str, total: int, begun: int) -> Callable[[int, str], None]:
    started = time.monotonic()
    printed, shown = -SECONDS, begun  # when, since the start; and how far it was then

    def update(done: int, text: str) -> None:
        nonlocal printed, shown
        seconds = time.monotonic() - started
        due = seconds - printed >= SECONDS  # also where one step takes long
        if (done < total and due) or (done >= total and done != shown):
            print(f"{title}: {done}/{total} {seconds:.0f} s {text}".rstrip(), flush=True)
            printed, shown = seconds, done

    return update
