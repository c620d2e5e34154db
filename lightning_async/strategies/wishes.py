"""What no count foresees calls a meeting of its own: whoever sees it says so, and all come as soon as all can hear it.

should_stop, a signal                                            any rank
max_time, train_time_interval, val_check_interval as a time      the first rank that lives: its clock speaks for all

A rank looks for its wishes after each batch and all the time that it waits at a meeting; what it was told by the end of
one, it says there (`closing.py`). A wish lasts until it is done: one that came too late for a meeting calls the next.

SLURM's signal goes to all tasks, and each hears it when its step lets it, perhaps behind the save that the first one
called for:

    rank 0    heard ---- calls -- MEETING: saved, a place in the queue asked for     its first: answered
    rank 1    .... in its step .. MEETING: saved ............... heard               its first too: answered, no wish
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from lightning_async.progress.report import Wish
from lightning_async.strategies import compat

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy


class Requeue:
    """SLURM's signal as one rank hears it: save, and ask for a new place in the queue.

    All ranks answer together, and a rank's signals are counted: the first that reaches it is the first that any of them
    answered, whenever it comes. One that comes again, since asking was in vain, is another.

    Attributes:
        heard: How many came to this rank.
        answered: How many of them are done with.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The run is over. Idempotent."""
        self.heard = self.answered = 0

    def hear(self, *signal: object) -> None:
        """From the signal handler: it is only counted."""
        self.heard += 1

    @property
    def wanted(self) -> bool:
        """Whether this rank heard what nobody has answered."""
        return self.heard > self.answered

    def answer(self) -> None:
        """All are about to save, for all that was heard by now."""
        self.answered = max(self.heard, self.answered + 1)


class Wishes:
    """What one rank wishes for.

    Attributes:
        stop: Whether this rank was told to stop.
        requeue: SLURM's signal.
    """

    def __init__(self, strategy: AsyncStrategy) -> None:
        self.stop, self.requeue = False, Requeue()
        self._strategy = strategy
        self._validated = 0.0

    def keep_stop(self, trainer: Trainer) -> None:
        """Where one rank alone was told, `should_stop` is a wish: Lightning would leave the loop at once."""
        if trainer.should_stop and compat.can_stop_early(trainer):
            trainer.should_stop, self.stop = False, True

    def validated(self) -> None:
        """A validation begins now; the time to the next one counts from here."""
        self._validated = time.monotonic()

    def now(self, trainer: Trainer, *, counts: bool, val_seconds: float | None) -> Wish:
        """All of them. With `counts` the Trainer's clocks are the run's."""
        by_time = counts and self._strategy.is_global_zero
        return self.told(trainer) | (self._by_time(trainer, val_seconds) if by_time else Wish.NOTHING)

    def told(self, trainer: Trainer) -> Wish:
        """What this rank was told: to stop, to be queued anew, to end."""
        wishes = Wish.NOTHING
        if self.stop or (trainer.should_stop and compat.can_stop_early(trainer)):
            wishes |= Wish.STOP
        if self.requeue.wanted:
            wishes |= Wish.REQUEUE
        if self._strategy.office.flags.told_to_end:
            wishes |= Wish.TERMINATE
        return wishes

    def _by_time(self, trainer: Trainer, val_seconds: float | None) -> Wish:
        wishes, now = Wish.NOTHING, time.monotonic()
        if val_seconds is not None and now - self._validated >= val_seconds and compat.validates_in_this_epoch(trainer):
            wishes |= Wish.VALIDATE
        saves = trainer.lightning_module.automatic_optimization  # by hand Lightning never saves by time
        for callback in compat.callbacks(trainer):
            if isinstance(callback, ModelCheckpoint) and saves and compat.save_is_due(callback, now):
                wishes |= Wish.SAVE
            if isinstance(callback, Timer) and compat.time_is_up(callback) and not trainer.should_stop:
                wishes |= Wish.SAVE
        return wishes
