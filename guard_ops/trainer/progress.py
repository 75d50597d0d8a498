"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .extras import require


@contextmanager
def progress_bar(title: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Yields ``update(done, text)``. Without a terminal only the finished bar is printed."""
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
