"""Statistics are told at meetings, merged alike on every rank, and logged by one: no rank waits for them in between.

    rank 0  say(stretch) --+                   +--> figures: the same dictionary on every rank
    rank 1  say(stretch) --+-- a meeting's -->--+    -> the Trainer's loggers (rank 0)    delay/p95, delay/rank3/...
    rank 2  say(stretch) --+   one round       +    -> the journal (rank 0)               for `lightning-async report`
                                                    -> the progress bar, callback_metrics, at the end of the epoch

Under a synchronous strategy the end of a training epoch is the meeting, and its own `reduce` the round.
"""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_async.callbacks.journal import Journal
from lightning_async.callbacks.once import stands_once
from lightning_async.callbacks.watched import Watched, watched
from lightning_async.progress.stretch import Stretch

Figures = dict[str, float]
HOOKS = ("on_train_batch_end", "on_before_optimizer_step")
"""Hooks of a step that may be listened at."""


class Stats(Callback):
    """What the callbacks that measure have in common.

    Attributes:
        group: The first part of its keys.
        shown: Keys that the progress bar shows too.
        needs: What is missing under a strategy that is not of this package; None: nothing.
        figures: What the last meeting said, the same on every rank.
    """

    group: ClassVar[str]
    shown: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[str | None] = None

    # A hook that is None is not called (see `listen`): one that does nothing costs each step more than a microsecond.
    on_train_batch_start = None  # type: ignore[assignment]
    on_train_batch_end = None  # type: ignore[assignment]
    on_before_zero_grad = None  # type: ignore[assignment]
    on_before_backward = None  # type: ignore[assignment]
    on_after_backward = None  # type: ignore[assignment]
    on_before_optimizer_step = None  # type: ignore[assignment]

    def __init__(self, *, folder: str | None = None) -> None:
        super().__init__()
        if folder is not None and (not isinstance(folder, str) or not folder):
            raise ValueError(f"`folder` must be the path of a folder, or None, got {folder!r}")
        self.folder = folder
        self.figures: Figures = {}
        self._journal: Journal | None = None
        self._strategy: Watched | None = None

    # -- for the callbacks --------------------------------------------------------------------------------------------

    def listen(self, hook: str, call: Callable[..., None]) -> None:
        """Be called at a hook of every step, for this fit."""
        vars(self)[hook] = call

    def say(self, stretch: Stretch) -> Any:
        """This rank's word at a meeting: what JSON can hold."""
        raise NotImplementedError  # each kind of statistics has its own

    def conclude(self, words: Mapping[int, Any]) -> Figures:
        """The figures that follow from all ranks' words, without the group's name."""
        raise NotImplementedError  # each kind of statistics has its own

    def sees(self, strategy: Watched) -> bool:
        """Whether this strategy of ours has what is measured."""
        return True

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Training starts; `self._strategy` is known."""

    def end(self, trainer: Trainer) -> None:
        """Training ended, well or not. May come twice."""

    def stretch(self, trainer: Trainer) -> Stretch:
        """The time since the last meeting under a synchronous strategy."""
        return Stretch()

    def draw(self, trainer: Trainer) -> None:
        """Histograms and the like, on rank 0."""

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take part in the meetings of this fit."""
        stands_once(trainer, self, "they would count the same things")
        if stage != "fit":
            return
        self.figures, self._strategy, self._trainer = {}, watched(trainer), trainer
        ours = self._strategy is not None
        if self._strategy is not None and not self.sees(self._strategy):
            self._strategy = None
        self._journal = Journal.of(trainer, self.folder)
        if self._strategy is not None:
            self._strategy.at_meetings(self.group, self.say, self.hear)
        elif self.needs is not None and trainer.is_global_zero:
            name = type(self).__name__
            remedy = "leave it out" if ours else "leave it out, or choose a strategy of lightning_async"
            warnings.warn(f"{name} has nothing to say under this strategy: {self.needs}; {remedy}", stacklevel=2)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the epoch before has logged is there, on every rank."""
        self._note_logged(trainer, behind="epoch")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the validation has logged is there."""
        if not trainer.sanity_checking:
            self._note_logged(trainer, behind="validation")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock starts."""
        if self._journal is not None:
            self._journal.start(trainer)
        self.begin(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Meet, where the strategy does not; show what there is."""
        if self._strategy is None and self.needs is None:
            self.hear(_all(trainer, self.say(self.stretch(trainer))))
        for name in self.shown:
            if math.isfinite(value := self.figures.get(name, math.nan)):
                self._show(pl_module, name, value)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take away what was put in place."""
        self._note_logged(trainer, behind="epoch")
        self._end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same."""
        self._end(trainer)

    def hear(self, words: Mapping[int, Any]) -> None:
        """Every rank's word: conclude, and log on rank 0."""
        self.figures = self.conclude(words)
        trainer = self._trainer
        if trainer.is_global_zero:
            step = trainer.global_step
            told = {f"{self.group}/{k}": v for k, v in self.figures.items() if math.isfinite(v)}
            for logger in trainer.loggers:
                logger.log_metrics(told, step=step)
            if self._journal is not None:
                self._journal.write(self.group, step, trainer.current_epoch, words)
            self.draw(trainer)

    def _show(self, module: LightningModule, name: str, value: float) -> None:
        """As a metric that is never synchronised: it is the same on every rank already."""
        key, metric = f"{self.group}/{name}", MeanMetric(sync_on_compute=False)
        metric.update(value)
        module.log(key, metric, prog_bar=True, logger=False, on_step=False, on_epoch=True, metric_attribute=key)

    def _end(self, trainer: Trainer) -> None:
        for hook in HOOKS:
            vars(self).pop(hook, None)
        self.end(trainer)
        Journal.close(trainer)
        self._journal = None  # what `validate` logs later is no part of this fit

    def _note_logged(self, trainer: Trainer, *, behind: str) -> None:
        """Losses and the like, for the report. Read on every rank: Lightning may compute what is read."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        if self._journal is not None:
            self._journal.logged(trainer.global_step, trainer.current_epoch, found, behind=behind)


def check_by_rank(by_rank: object) -> None:
    """Raise for what is no number of ranks up to which each has figures of its own."""
    if not isinstance(by_rank, int) or isinstance(by_rank, bool) or by_rank < 0:
        raise ValueError(f"`by_rank` must be an integer of at least 0, got {by_rank!r}")


def _all(trainer: Trainer, word: Any) -> dict[int, Any]:
    """Every rank's word under a synchronous strategy; all ranks are here. Two sums: of lengths, then of bytes."""
    if trainer.world_size == 1:
        return {0: json.loads(json.dumps(word))}
    mine = torch.frombuffer(bytearray(zlib.compress(json.dumps(word).encode())), dtype=torch.uint8)
    lengths = _rows(trainer, torch.tensor([len(mine)])).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(mine)] = mine
    rows = zip(_rows(trainer, padded), lengths, strict=True)
    return {
        rank: json.loads(zlib.decompress(row[:length].numpy().tobytes())) for rank, (row, length) in enumerate(rows)
    }


def _rows(trainer: Trainer, mine: Tensor) -> Tensor:
    """One row of each rank: the sum of tables in which all other rows are zero."""
    table = torch.zeros(trainer.world_size, len(mine), dtype=mine.dtype)
    table[trainer.global_rank] = mine
    summed: Tensor = trainer.strategy.reduce(table.to(trainer.strategy.root_device), reduce_op="sum")
    return summed.cpu()
