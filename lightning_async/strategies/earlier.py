"""What an earlier part of the run trained counts as if the members that there are now had trained it, step by step.

a checkpoint           what all had trained when it was written, by so many members
an earlier fit         the same of this Trainer's last one
neither                Lightning's own counts: nothing, or those of a run in plain Lightning
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from lightning_async.progress.progress import Progress
from lightning_async.progress.tally import Tally
from lightning_async.strategies import compat


class Sums(NamedTuple):
    """With what a progress begins (see `Progress`)."""

    before: Tally
    epoch: Tally
    evened: int
    taken: int


class Earlier:
    """What came before this fit."""

    def __init__(self) -> None:
        self._restored: Mapping[str, Any] = {}
        self._fitted: tuple[Tally, int, int] | None = None  # what all had trained when the last fit of this Trainer
        # ended, what a step of it weighed, and how many updates that took

    def load(self, state: Mapping[str, Any]) -> None:
        """A checkpoint says this of it."""
        self._restored = state

    def loaded(self) -> None:
        """Lightning's counts are those of a checkpoint."""
        self._fitted = None

    def close(self, progress: Progress | None) -> None:
        """The fit is over, and came so far. Idempotent."""
        self._restored = {}
        if progress is not None:
            self._fitted = progress.agreed, progress.n, progress.taken

    @property
    def waited(self) -> bool:
        """Whether this rank had nothing more to train on in its epoch, and others had."""
        return bool(self._restored.get("ended", False))

    def scheduled(self, steps: int) -> int:
        """The step to which the schedules by step had come; this one, if nobody noted it."""
        return int(self._restored.get("scheduled", steps))

    def was_alike(self, n: int, steps_of: list[int]) -> bool:
        """Whether it was a checkpoint of a run whose steps weighed the same, and whose epochs had as many."""
        return (self._restored.get("n"), self._restored.get("steps_of")) == (n, steps_of)

    def sums(self, trainer: Trainer, n: int, members: int) -> Sums:
        """All of it, where a step weighs `n` and is of so many members."""
        before, epoch = self._tallies(trainer, n)
        evened = int(self._restored.get("evened", 0)) * n // self._restored.get("n", n)
        return Sums(before, epoch, evened, self._taken(before.updates - evened, n, members))

    def _tallies(self, trainer: Trainer, n: int) -> tuple[Tally, Tally]:
        state = self._restored
        if not state:
            batches = trainer.fit_loop.epoch_loop.batch_progress
            done, by = Tally(batches.total.ready), 1
            if self._fitted is not None and trainer.global_step:  # else this is another Trainer
                done, by, _ = self._fitted
            before = Tally(done.batches * n // by, trainer.global_step * n, done.samples)
            return before, before.minus(Tally(batches.current.ready * n if compat.is_in_mid_epoch(trainer) else 0))
        return tuple(_scaled(Tally(*state[name]), n, state["n"]) for name in ("agreed", "epoch"))  # type: ignore[return-value]

    def _taken(self, counted: int, n: int, members: int) -> int:
        """How many updates that took, one by one."""
        state = self._restored
        if not state and self._fitted is not None and counted:
            return self._fitted[2]
        if "taken" not in state:
            return counted * members // n
        return int(state["taken"]) * members // int(state["members"])


def _scaled(tally: Tally, n: int, before: int) -> Tally:
    """The counts at the same step of the run where one counts for `n`."""
    return Tally(tally.batches * n // before, tally.updates * n // before, tally.samples)
