"""Progress inside an iteration: rollout, reward and update, as calls of the network go by."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..trainer.extras import require
from ..trainer.policy import Reward

SECONDS = 30.0  # between two lines, where there is no terminal
STAGES = ("rollout", "reward", "update")


class Watch:
    """Counts an iteration's calls of ``network`` and of the reward, and shows them.

    How many there are is known from the iteration before; the first one's bar has no end.
    """

    def __init__(self, network: nn.Module, iterations: int) -> None:
        self._iterations, self._done = iterations, 0
        self._counts: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._stage, self._show = "", _nothing
        self._handle = network.register_forward_hook(lambda *_: self._called())

    def reward(self, reward: Reward) -> Reward:
        """The reward, whose calls are counted."""

        def counted(
            pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
        ) -> Tensor:
            self._advance("reward", len(prompts))
            return reward(pixels, prompts, metadata)

        return counted

    def _called(self) -> None:
        after = self._stage in ("reward", "update") or torch.is_grad_enabled()
        self._advance("update" if after else "rollout", 1)

    def _advance(self, stage: str, by: int) -> None:
        self._stage = stage
        self._counts[stage] = self._counts.get(stage, 0) + by
        self._show(stage, self._counts[stage], self._totals.get(stage), self._done)

    def iteration(self, done: int, text: str) -> None:
        """An iteration has ended."""
        self._done, self._totals, self._counts = done, self._counts, {}
        self._stage = ""
        self._show("", 0, None, done, text)

    @contextmanager
    def shown(self, title: str, done: int) -> Iterator[None]:
        """Bars in a terminal; elsewhere a line at most every half minute."""
        self._done = done
        try:
            if not require("rich.console", "train").Console(file=sys.stdout).is_terminal:
                self._show = _lines(title, self._iterations)
                yield
                return
            with _bars(title, self._iterations, done) as self._show:
                yield
        finally:
            self._show = _nothing
            self._handle.remove()


def _nothing(*_: Any) -> None:
    pass


def _lines(title: str, iterations: int) -> Callable[..., None]:
    started = time.monotonic()
    printed = started - SECONDS

    def show(stage: str, count: int, total: int | None, done: int, text: str = "") -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed < SECONDS and not (not stage and done >= iterations):
            return
        within = f"{stage} {count}{f'/{total}' if total else ''}" if stage else text
        print(f"{title}: {done}/{iterations} {now - started:.0f} s {within}".rstrip(), flush=True)
        printed = now

    return show


@contextmanager
def _bars(title: str, iterations: int, done: int) -> Iterator[Callable[..., None]]:
    rich = require("rich.progress", "train")
    columns = (
        rich.TextColumn("{task.description:<28}"),
        rich.BarColumn(bar_width=24),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.fields[text]}"),
    )
    with rich.Progress(*columns) as bars:
        whole = bars.add_task(title, total=iterations, completed=done, text="")
        part = bars.add_task("", total=None, text="")

        def show(stage: str, count: int, total: int | None, done: int, text: str = "") -> None:
            if stage:
                bars.update(part, description=f"  {stage}", completed=count, total=total)
            else:
                bars.update(whole, completed=done, text=text)

        yield show
