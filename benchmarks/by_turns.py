"""Whole epochs with all callbacks that measure, and without them, by turns within one run: a loss of 1 % can be told.

    epoch     0       1  2     3  4     5  6    ...      of a pair one has them; which, is drawn, alike on all ranks
              warm    w  .     .  w     w  .
    a pair    samples per second with them over those without; two neighbours share the machine's mood
    whole     from an epoch's first batch to the next one's: the wait for the last batches, meeting and validation too
    steps     from when a twentieth of all ranks' batches is done to when 17 of them are: nobody waits yet

Two runs differ by more than 1 % in how they start, in the second of an epoch at which a slow rank comes to its end, and
in what else the machine does within minutes. Here the first is left out, the second is averaged over many ends, and the
third hits both of a pair. Without them is without all of it: no hook, no word at the meeting, no factor asked for.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.subject import made
from benchmarks.table import Cell
from benchmarks.work import Digits, Record, Recorder, Work, loaders, measuring
from lightning_async import AdaptiveShrink, AsyncStrategy, SpeedFaults
from lightning_async.algorithms.algorithm import no_shrink

EARLY, LATE = 0.05, 0.85  # parts of all ranks' batches
SURE = 1.96  # standard deviations on each side of 95 %


@dataclass(frozen=True)
class Ratio:
    """A ratio by pairs: its mean, and half of its 95 % interval."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float], others: Sequence[float]) -> Ratio:
        """Of each of these to its partner."""
        logs = [math.log(mine / theirs) for mine, theirs in zip(values, others, strict=True)]
        return cls(math.exp(fmean(logs)), SURE * stdev(logs) / math.sqrt(len(logs)))

    @property
    def off(self) -> float:
        """How far from 1 it may be."""
        return abs(self.mean - 1) + self.half

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({self.mean - self.half:.4f} to {self.mean + self.half:.4f})"


def drawn(pairs: int, seed: int = 0) -> list[bool]:
    """Which epochs have the callbacks: one of each pair; the first and the last, which do not count, have them too."""
    draw = random.Random(seed)
    return [True, *(one for _ in range(pairs) for one in draw.choice([(True, False), (False, True)])), True]


def by_turns(work: dict[str, Any], knobs: dict[str, Any], folder: str, order: list[bool]) -> dict[str, Any]:
    """One rank; returns its `Record` as a dictionary."""
    job = Work.read(work)
    recorder, callbacks = Recorder(0.0, None), measuring(folder)
    faults = SpeedFaults(step_seconds=job.step, slow=dict(job.slow))
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=made(knobs),
        max_epochs=len(order),
        callbacks=[recorder, faults, *callbacks, Shift(order, callbacks)],
        num_sanity_val_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(Digits(job), *loaders(job))
    return asdict(recorder.record)


class Shift(Callback):
    """Behind these callbacks in the Trainer's list: takes them out for an epoch, with all that they put elsewhere."""

    def __init__(self, order: Sequence[bool], others: Sequence[Callback]) -> None:
        self._order, self._others = [*order, True], list(others)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """They have taken their places: see where."""
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncStrategy)
        self._strategy, self._voices = strategy, dict(strategy.consensus.telling._voices)
        self._put(trainer, self._order[0])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For the next epoch; all are there at the end."""
        self._put(trainer, self._order[trainer.current_epoch + 1])

    def _put(self, trainer: Trainer, there: bool) -> None:
        rest = [c for c in vars(trainer)["callbacks"] if c not in self._others]
        at = rest.index(self)
        vars(trainer)["callbacks"] = rest[:at] + (self._others if there else []) + rest[at:]
        self._strategy.consensus.telling._voices = dict(self._voices) if there else {}
        (shrink,) = (c for c in self._others if isinstance(c, AdaptiveShrink))
        self._strategy.shrink = shrink.factor if there else no_shrink


@dataclass(frozen=True)
class Epoch:
    """How long an epoch took, in seconds."""

    whole: float
    steps: float

    @property
    def ends(self) -> float:
        """What it took longer than all steps would at that pace."""
        return self.whole - self.steps / (LATE - EARLY)


def epochs_of(records: Sequence[Record]) -> list[Epoch]:
    """All but the first, and but the last, behind which no other begins."""
    found = []
    for epoch in range(1, len(records[0].epochs) - 1):
        spans = [record.marks[slice(*record.epochs[epoch - 1 : epoch + 1])] for record in records]
        marks = sorted(mark for span in spans for mark in span)
        begin, end = (fmean(record.first[at] for record in records) for at in (epoch, epoch + 1))
        early, late = (marks[int(part * len(marks))] for part in (EARLY, LATE))
        found.append(Epoch(end - begin, late - early))
    return found


def told(
    records: Sequence[Record], order: Sequence[bool], samples: int
) -> tuple[Ratio, Mapping[str, Mapping[str, Cell]]]:
    """The ratio of whole epochs, and the cells of the epochs with and without."""
    found = dict(enumerate(epochs_of(records), 1))
    pairs = [sorted((one, one + 1), key=lambda at: order[at]) for one in range(1, len(order) - 1, 2)]
    sides = {name: [found[pair[at]] for pair in pairs] for at, name in enumerate(("without", "with"))}
    ratios = {
        what: Ratio.of(*([getattr(epoch, what) for epoch in sides[name]] for name in ("without", "with")))
        for what in ("whole", "steps")
    }
    cells: dict[str, dict[str, Cell]] = {
        name: {
            "samples/s": samples / fmean(epoch.whole for epoch in epochs),
            "epochs": len(epochs),
            "ends ms": 1e3 * fmean(epoch.ends for epoch in epochs),
            "sd of ends": 1e3 * stdev(epoch.ends for epoch in epochs),
            "sd of steps": 1e3 * stdev(epoch.steps for epoch in epochs),
        }
        for name, epochs in sides.items()
    }
    cells["with"] |= {"to without": str(ratios["whole"]), "steps only": str(ratios["steps"])}
    return ratios["whole"], cells
