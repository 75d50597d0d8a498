"""Asking a reward: its answer is checked, tried again, and awaited no longer than it may take."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .policy import Reward, Scores

_MOST_WAITING = 2  # batches whose pixels are kept while the reward is behind


class RewardError(RuntimeError):
    """A reward gave no usable answer, however often it was asked; names the prompt."""


class Batch(NamedTuple):
    """What a reward is asked at a time."""

    pixels: Tensor  # [B, 3, H, W] or [B, F, 3, H, W] in [0, 1]
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]

    def one(self, row: int) -> Batch:
        rows = slice(row, row + 1)
        return Batch(self.pixels[rows], self.prompts[rows], self.metadata[rows])


class Judge:
    """Asks ``reward``, of whose faults none is silent and a passing one is mended.

    Args:
        reward: of each sample a number; see :data:`~guard_ops.trainer.Reward`.
        retries: how often a batch is asked again after an error, an answer that is not finite or
            not [B], or none in time.
        timeout: seconds that one answer may take; None: any. A reward that takes longer is left
            behind in a thread that ends with the process.
        overlap: ask in a thread, so that the next samples are made meanwhile.
        nonfinite: whether an answer may have NaN and infinities, which the objective then drops.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        retries: int = 1,
        timeout: float | None = None,
        overlap: bool = False,
        nonfinite: bool = False,
    ) -> None:
        self.reward, self.retries, self.timeout, self.overlap = reward, retries, timeout, overlap
        self.nonfinite = nonfinite
        self._worker: _Worker | None = None

    def __call__(
        self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        """The scores of a batch, on the CPU.

        Raises:
            RewardError: there are none.
        """
        return self.await_(self.ask(Batch(pixels, prompts, metadata)))

    def ask(self, batch: Batch) -> tuple[Batch, Future[Scores] | None]:
        """Have a batch judged; :meth:`await_` returns its scores."""
        if self.timeout is None and not self.overlap:
            return batch, None
        return batch, self._submit(batch)

    def await_(self, asked: tuple[Batch, Future[Scores] | None]) -> Scores:
        """The scores of what was asked.

        Raises:
            RewardError: there are none, after ``retries``.
        """
        batch, future = asked
        for _ in range(self.retries):
            try:
                return self._answer(batch, future)
            except Exception:
                future = None
        try:
            return self._answer(batch, future)
        except Exception as error:
            said = "" if isinstance(error, _UnusableError) else self._which(batch)
            fault = said or _fault(error, batch)
            tries = f"{self.retries + 1} times" if self.retries else "once"
            name = getattr(self.reward, "__name__", type(self.reward).__name__)
            raise RewardError(f"the reward {name} {fault} (asked {tries})") from error

    def _answer(self, batch: Batch, future: Future[Scores] | None = None) -> Scores:
        """The checked scores; whatever the reward raises, or a :class:`_LateError`."""
        if future is None:
            if self.timeout is None and not self.overlap:
                return self._checked(batch)
            future = self._submit(batch)
        try:
            return future.result(self.timeout)
        except futures.TimeoutError as error:
            if future.done():  # the reward's own
                raise
            self._worker = None  # it is stuck
            raise _LateError(f"gave no answer in {self.timeout:g} s", batch) from error

    def _submit(self, batch: Batch) -> Future[Scores]:
        if self._worker is None:
            self._worker = _Worker(batch.pixels.device)
        return self._worker.submit(lambda: self._checked(batch))

    @torch.no_grad()
    def _checked(self, batch: Batch) -> Scores:
        """What the reward says of a batch, on the CPU.

        Raises:
            _UnusableError: it is not [B], or not finite. Whatever the reward raises.
        """
        found = self.reward(batch.pixels, batch.prompts, batch.metadata)
        scores = found if isinstance(found, Scores) else Scores(found, {})
        expected = (len(batch.prompts),)
        for name, value in {"": scores.total, **scores.parts}.items():
            said = f"part {name!r} " if name else ""
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise _UnusableError(f"returned {said}a {kind}; it needs a tensor [B]", batch)
            if value.shape != expected:
                shape = tuple(value.shape)
                raise _UnusableError(
                    f"returned {said}of shape {shape} for {expected[0]} samples", batch
                )
        wide = torch.promote_types(scores.total.dtype, torch.float32)
        total = scores.total.detach().to("cpu", wide)
        for row, value in enumerate(() if self.nonfinite else total.tolist()):
            if value - value != 0:
                raise _UnusableError(f"returned {value}", batch.one(row))
        return Scores(total, {n: x.detach().to("cpu", wide) for n, x in scores.parts.items()})

    def _which(self, batch: Batch) -> str:
        """The fault of the first sample that has one when it is asked alone; else empty."""
        for row in range(len(batch.prompts) if len(batch.prompts) > 1 else 0):
            one = batch.one(row)
            try:
                self._answer(one)
            except Exception as error:
                return _fault(error, one)
        return ""


class Judging:
    """An iteration's batches, in turn; the first that fails is told at the end, by :meth:`scores`.

    A rank whose reward has failed goes on making samples, as others wait for its calls.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge, self._asked = judge, list[tuple[Batch, Future[Scores] | None]]()
        self._scores: list[Scores] = []
        self.fault: RewardError | None = None

    def add(
        self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> None:
        if self.fault is None:
            self._asked.append(self._judge.ask(Batch(pixels, prompts, metadata)))
            while len(self._asked) > (_MOST_WAITING if self._judge.overlap else 0):
                self._take()

    def scores(self) -> Scores | None:
        """Of all batches, on the CPU; None if there is a ``fault``."""
        while self._asked:
            self._take()
        if self.fault is not None:
            return None
        first = self._scores[0].parts
        for each in self._scores:
            if each.parts.keys() != first.keys():
                self.fault = RewardError(
                    f"the reward named the parts {', '.join(first)} of one batch and "
                    f"{', '.join(each.parts)} of another; it needs the same of all"
                )
                return None
        total = torch.cat([each.total for each in self._scores])
        return Scores(
            total, {name: torch.cat([each.parts[name] for each in self._scores]) for name in first}
        )

    def _take(self) -> None:
        asked = self._asked.pop(0)
        if self.fault is None:
            try:
                self._scores.append(self._judge.await_(asked))
            except RewardError as error:
                self.fault = error


class _Worker:
    """A thread that does one thing after another, and does not keep the process alive."""

    def __init__(self, device: torch.device) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[], Scores], Future[Scores]]] = (
            queue.SimpleQueue()
        )
        self._device = device
        threading.Thread(target=self._run, daemon=True, name="guard_ops reward").start()

    def submit(self, work: Callable[[], Scores]) -> Future[Scores]:
        future: Future[Scores] = Future()
        self._queue.put((work, future))
        return future

    def _run(self) -> None:
        if self._device.type == "cuda":  # the current device is a thread's own, as the gradient is
            torch.cuda.set_device(self._device)
        while True:
            work, future = self._queue.get()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del work, future  # and with them the pixels


class _UnusableError(Exception):
    def __init__(self, fault: str, batch: Batch) -> None:
        super().__init__(fault)
        self.batch = batch


class _LateError(_UnusableError):
    """No answer in time."""


def _fault(error: BaseException, batch: Batch) -> str:
    if isinstance(error, _UnusableError):
        return f"{error}{_of(error.batch)}"
    return f"raised {type(error).__name__}: {error}{_of(batch)}"


def _of(batch: Batch) -> str:
    said = ", ".join(repr(prompt) for prompt in dict.fromkeys(batch.prompts))
    if len(said) > 300:
        first = batch.prompts[0]
        said = f"{first[:200]!r} and {len(batch.prompts) - 1} more"
    return f", for the prompt{'s' if len(set(batch.prompts)) > 1 else ''} {said}"
