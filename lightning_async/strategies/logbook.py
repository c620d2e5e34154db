"""The logbook: how far the run has come goes to the Trainer's loggers, beside what the module logs.

    progress/samples    samples that all ranks have trained on
    progress/updates    optimizer steps that all ranks have taken, each counted once
    progress/batch      samples of a step of the run, since the last meeting: the effective batch

An entry is made where Lightning logs a step, and at every meeting. At a meeting it is exact; in between it is what the
others have told by then, so never more than was done. Nobody waits for it: every rank makes its entries alone, and the
loggers write those of rank 0. (Of a pipeline rank 0 alone makes them, and its meetings are its rests. Between those it
does not know what replicas train on: there `progress/batch` is that of the last rest.)
"""

from __future__ import annotations

from typing import Protocol

from lightning.pytorch import Trainer

from lightning_async.progress.tally import Tally
from lightning_async.strategies import compat


class Counts(Protocol):
    """How far the run has come."""

    @property
    def n(self) -> int:
        """So many updates are a step of the run."""

    def told(self) -> Tally:
        """What all have done at least."""

    def told_taken(self) -> int:
        """The updates of it, one by one and not weighed."""


class Logbook:
    """The entries of one rank."""

    def __init__(self) -> None:
        self._mark = Tally()
        self._batch = 0.0
        self._step = -1

    def begin(self, progress: Counts) -> None:
        """The run goes on from here."""
        self._mark, self._batch, self._step = progress.told(), 0.0, -1

    def stepped(self, trainer: Trainer, progress: Counts, *, all_told: bool = True) -> None:
        """A batch is trained on: an entry where Lightning logs it. `all_told`: samples and updates of all alike."""
        if trainer.loggers and compat.logs_now(trainer) and (step := compat.log_step(trainer)) != self._step:
            self._enter(trainer, progress, step, renew=all_told)

    def met(self, trainer: Trainer, progress: Counts) -> None:
        """All have met: an entry, and the effective batch counts from here."""
        self._enter(trainer, progress, max(0, trainer.global_step - 1), renew=True)
        self._mark = progress.told()

    def _enter(self, trainer: Trainer, progress: Counts, step: int, *, renew: bool) -> None:
        done = progress.told()
        since = done.minus(self._mark)
        if renew and since.updates > 0:
            self._batch = since.samples * progress.n / since.updates
        self._step = step
        entry = {"samples": float(done.samples), "updates": float(progress.told_taken())}
        if self._batch:
            entry["batch"] = self._batch
        compat.log(trainer, {f"progress/{name}": value for name, value in entry.items()}, step)
