"""Trainer: a run, with the folder it writes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

import guard_ops as go

from . import checkpoint, state
from .config import TrainConfig
from .ema import Ema
from .engine import Engine
from .folder import FolderLock, RunFolderError
from .judging import RewardError
from .learner import Learner, MakeOptimizer
from .loop import Loop
from .metrics import MetricsWriter, write_ratios
from .policy import FlowPolicy, Reward, trainable
from .progress import progress_bar


class Trainer:
    """Fine-tunes ``policy`` to raise ``reward`` with the objective ``guard``.

    Args:
        policy: a :class:`FlowPolicy`; it is trained in place.
        reward: ``(pixels, prompts, metadata) -> [B]``, called for some samples at a time.
        prompts: the texts to draw from.
        guard: the objective (``go.GuardConfig.article()`` ...).
        config: everything else.
        out: folder of ``metrics.jsonl``, ``tensorboard/`` and ``checkpoints/``.
        metadata: a mapping for each prompt, which the reward of its samples is given.
        engine: the device and the ranks; by default those that a launcher has made.
        resume: continue from the newest intact checkpoint in ``out``, if there is one.
        optimizer: makes one of the list of trained parameters; by default AdamW.
        evaluate: called on every rank each ``config.evaluate_every`` iterations; rank 0's numbers
            join that line of the metrics. It must draw from a generator of its own. It may set
            ``best``, so that a checkpoint is kept in ``best/``, and ``finished``, so that the run
            ends after this iteration; on every rank.
        observe: ``(iteration, numbers)``, called on rank 0 after each line of the metrics.
        initialize: called when a run begins, before the policy is shared among ranks, to give it
            its first weights; those of a resumed run come from its checkpoint.
        recipe: numbers and text that a continuation must share with its run, beside what the
            trainer compares itself: where the policy or the reward came from.

    Raises:
        ValueError: ``out`` has checkpoints and ``resume`` is False, or is of a run with other
            settings; nothing is to be trained, or there are too few samples for the ranks.
            RunFolderError: another process trains in ``out``, or it cannot be written.
            CheckpointError: all checkpoints are damaged. What is refused leaves the files as they
            were, but ``run.lock``, which says who had the folder last.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        reward: Reward,
        prompts: Sequence[str],
        guard: go.GuardConfig,
        config: TrainConfig,
        out: str | Path,
        *,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        engine: Engine | None = None,
        resume: bool = False,
        optimizer: MakeOptimizer | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        observe: Callable[[int, dict[str, Any]], object] | None = None,
        initialize: Callable[[], object] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy, self.config, self.out = policy, config, Path(out)
        self.engine, self.evaluate, self.observe = engine or Engine(), evaluate, observe
        self.best, self.finished = False, False  # what an evaluation says, alike on all ranks
        self.checkpoints = self.out / "checkpoints"
        rows: Sequence[Mapping[str, Any]] = [{}] * len(prompts) if metadata is None else metadata
        _check(policy, prompts, rows, config)
        make = optimizer or self._adamw
        before = trainable(policy)
        chosen = state.chosen(prompts, rows, guard, config, recipe or {})
        self.settings = state.settings(policy, make(list(before.values())), config, chosen)
        self.writer = MetricsWriter(self.out, tensorboard=config.tensorboard)
        self._lock: FolderLock | None = None
        try:
            self.engine.first(self._take_folder)
            saved, unusable = state.find(self.checkpoints, resume, self.engine)
            if saved is not None:
                state.check(saved, self.settings, before)
                checkpoint.set_aside(unusable, "using the previous checkpoint")
            elif initialize is not None:
                initialize()
            self.engine.wrap(policy)
            parameters = trainable(policy)
            ema = Ema(parameters, config.ema_decay)
            self.learner = Learner(parameters, make(list(parameters.values())), ema)
            if saved is not None:
                state.restore(self.learner, saved, self.engine)
            self.loop = Loop(
                policy, reward, prompts, rows, guard, config, self.engine, self.learner
            )
            text = None if saved is None else saved.metrics
            self.engine.first(lambda: self.writer.start(self.iteration, text))
            if saved is None and config.checkpoint_every:
                self.save()  # marks the folder as taken; a run killed early resumes here
        except BaseException:
            with suppress(RunFolderError):  # the first failure is the one to see
                self.close()
            raise

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return self.learner.parameters

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.learner.optimizer

    @property
    def ema(self) -> Ema:
        """The average of the weights."""
        return self.learner.ema

    @property
    def iteration(self) -> int:
        """How many iterations are done."""
        return self.learner.iteration

    def iterate(self) -> dict[str, Tensor]:
        """One iteration, of which nothing is written."""
        numbers = self.loop.iterate()
        self.learner.iteration += 1
        return numbers

    def fit(self, progress: bool = True, title: str = "training") -> None:
        """Train until ``config.iterations``, writing metrics and checkpoints on the way.

        A run that has come so far already does nothing.

        Raises:
            FloatingPointError: the loss, or the gradient of an update, is not finite, which is
                noticed before a checkpoint. Such a gradient is not applied.
            RewardError: the reward gives no usable answer. A checkpoint of the state before that
                is written first; nothing is lost.
        """
        c = self.config
        if self.iteration >= c.iterations:
            return
        shown = progress and self.engine.rank == 0
        with progress_bar(title, c.iterations, self.iteration) if shown else nullcontext() as bar:
            if bar is not None:
                done = self.learner  # not `self`, which would keep itself alive
                self.loop.report = lambda phase, n, of: bar(done.iteration, f"{phase} {n}/{of}")
            while self.iteration < c.iterations and not self.finished:
                started = time.perf_counter()
                try:
                    found = self.iterate()
                except RewardError as error:
                    self._stop(error)
                numbers: dict[str, Any] = {n: x.tolist() for n, x in found.items()}
                self._refuse_nonfinite(numbers)
                numbers["seconds"] = time.perf_counter() - started
                last = self.iteration == c.iterations
                if self.evaluate and (last or self.iteration % c.evaluate_every == 0):
                    try:
                        numbers.update(self.evaluate())
                    except RewardError as error:  # the iteration itself is whole
                        self._record(numbers)
                        self._stop(error)
                last = last or self.finished
                self._record(numbers)
                if self.best:
                    self.keep_best()
                if c.checkpoint_every and (last or self.iteration % c.checkpoint_every == 0):
                    self.save()
                if bar is not None:
                    bar(self.iteration, f"reward {numbers['reward']:.3f}")

    def _record(self, numbers: dict[str, Any]) -> None:
        """A line of the metrics."""
        if self.engine.rank == 0:
            self.writer.write(self.iteration, numbers)
            every = self.config.evaluate_every
            if self.iteration % every == 0 or self.iteration == self.config.iterations:
                write_ratios(self.out, self.iteration, self.loop.ratios)
            if self.observe is not None:
                self.observe(self.iteration, numbers)

    def _stop(self, error: RewardError) -> NoReturn:
        """Keep the state as it is, unless that is kept already, and raise ``error``."""
        where = f"in iteration {self.iteration + 1}"
        if not self.config.checkpoint_every:
            raise RewardError(f"{error}, {where}; no checkpoints are kept") from error
        folder = self.checkpoints / checkpoint.name_of(self.iteration)
        if not self.engine.first(folder.exists):
            self.save()
        raise RewardError(
            f"{error}, {where}; saved until there: {folder}, from which `resume=True` goes on"
        ) from error

    def save(self) -> Path:
        """Write a checkpoint of this moment; returns its folder. Every rank has to call.

        Raises:
            RunFolderError: it cannot be written, or this iteration has one already.
        """
        text = self.engine.first(self.writer.sync)
        keep = self.config.keep_checkpoints
        return state.save(self.checkpoints, self.learner, self.settings, text, keep, self.engine)

    def keep_best(self) -> None:
        """Keep a checkpoint of this moment in ``best/``, instead of the one there."""
        self.best = False
        root = self.out / "best"
        if not self.engine.first((root / checkpoint.name_of(self.iteration)).exists):
            text = self.engine.first(self.writer.sync)
            state.save(root, self.learner, self.settings, text, 1, self.engine)

    def close(self) -> None:
        """Close the metrics files and leave the folder to others."""
        try:
            self.writer.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _refuse_nonfinite(self, numbers: Mapping[str, Any]) -> None:
        where = f"in iteration {self.iteration}"
        if not math.isfinite(numbers["loss"]):
            raise FloatingPointError(
                f"the loss is {numbers['loss']} {where} ({sum(numbers['nonfinite']):.0f} "
                "transitions are not finite); the checkpoints are from before it. "
                'GuardConfig(nonfinite="drop") skips such transitions'
            )
        norms = self.loop.norms.tolist()
        for number, norm in enumerate(norms, 1):
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"the norm of the gradient is {norm} in update {number} of {len(norms)} "
                    f"{where}; that gradient was not applied, and the checkpoints are from before "
                    "it"
                )

    def _take_folder(self) -> None:
        self._lock = FolderLock(self.out)

    def _adamw(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        return torch.optim.AdamW(parameters, lr=c.learning_rate, weight_decay=c.weight_decay)


def _check(
    policy: FlowPolicy,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    config: TrainConfig,
) -> None:
    if not trainable(policy):
        raise ValueError("`policy` has no parameter that requires grad; there is nothing to train")
    if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
        raise TypeError("`prompts` needs to be a sequence of texts")
    if len(prompts) < config.prompts_per_iteration:
        raise ValueError(
            f"`prompts` has {len(prompts)} texts; `prompts_per_iteration` "
            f"{config.prompts_per_iteration} needs at least as many"
        )
    if len(metadata) != len(prompts):
        raise ValueError(f"`metadata` has {len(metadata)} entries for {len(prompts)} `prompts`")
