"""At a rest all stages are after the same batch: they hear what the last one logged, and do what anybody wishes.

A callback, a hook, a user or a signal that wishes something of one rank in mid-epoch may not stop that rank alone: the
others would wait for it. At a rest all agree; between rests the wish travels with the batches (`place`):

    should_stop               all leave the loop
    SLURM's requeue signal    all save, and train on
    time to validate          all do: the clock of rank 0 speaks for all
    SIGTERM                   all stop, in good order: who saves on exceptions saves a whole checkpoint
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_async.progress.report import Wish
from lightning_async.progress.tally import ZERO
from lightning_async.strategies import compat, words
from lightning_async.strategies.logbook import Logbook
from lightning_async.strategies.pipe_saving import PipeSaving
from lightning_async.strategies.wishes import Requeue


class Resting(PipeSaving):
    """The rests of one rank.

    Attributes:
        rested: Whether all have heard of each other since the last batch.
        closing: Whether all stop here because they were told to end.
        begun: Whether batches are trained on: a SIGTERM may wait for the next one.
    """

    rested = closing = begun = False
    _stop = _validates = False
    _entered = ZERO

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._logbook, self._requeue = Logbook(), Requeue()

    def rest(self, *, drain: bool = False) -> None:
        """All stages are after the same batch; all know what the last one logged, and whether to stop."""
        if not self.piped and self.fitting:  # nobody to rest with: its callbacks hear what they say themselves
            self.telling.arrive()
            self.together(self.tell())
            self._enter()
        if not self.meeting:
            return
        turns, trainer = self.turns, self.trainer
        self.telling.arrive()
        self.together(turns.place.rest(turns.batches + turns.passes))
        if drain:  # behind the word that all are here: a drain alone would wait for who trains on
            turns.drain()
        if self.fitting:
            turns.even_buffers()
        self.together(self.tell())
        mine = {key: float(value) for key, value in trainer.callback_metrics.items()}
        known = self.together(words.broadcast(self.office.rounds, mine, 0))
        if self.global_rank != 0:
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in known.items()})
        wish = trainer.should_stop or self._stop
        trainer.should_stop = self.together(words.decide(self.office.rounds, wish, False))
        self.rested = True
        if self.fitting:
            self.hear_counts()
            self._enter()

    def begin_log(self) -> None:
        """Training starts: from a checkpoint, behind an earlier fit of this Trainer, or from nothing."""
        before = self.counts.told() if self.trainer.global_step else ZERO
        self.counts.begin(self.resumed.get("counted", before))
        self._entered = self.counts.told()
        self._logbook.begin(self.counts)

    def log_batch(self) -> None:
        """A batch is trained on: what rank 0 knows of all goes to the loggers, if that is due."""
        if self.global_rank == 0:
            self._logbook.stepped(self.trainer, self.counts, all_told=self.replicas == 1)

    def _enter(self) -> None:
        """All rest: an entry, if something was trained on since the last rest."""
        if self.global_rank == 0 and self.counts.told() != self._entered:
            self._entered = self.counts.told()
            self._logbook.met(self.trainer, self.counts)

    def hear_requeue(self, leash: compat.Leash) -> None:
        """SLURM's signal is only counted: in its handler nobody may wait for the others."""
        self._save_and_requeue: Callable[..., Any] = leash.replace(
            "_signal_connector._slurm_sigusr_handler_fn", self._requeue.hear
        )

    def keep_stop(self) -> None:
        """What told one rank to stop before a batch is a wish."""
        self._stop = self._stop or self.trainer.should_stop
        self.trainer.should_stop = False

    def validate_together(self, leash: compat.Leash) -> None:
        """Each rank's own clock would say something else."""

        def is_due(fetcher: Any) -> Any:
            timed = compat.val_seconds(self.trainer) is not None
            other = 0.0 if self._validates else math.inf
            with compat.with_val_seconds(self.trainer, other if timed else None):
                return validates(fetcher)

        validates = leash.replace("fit_loop.epoch_loop._should_check_val_fx", is_due)

    def stop_together(self) -> None:
        """One that wishes something in mid-epoch may not do it alone: all do it after the same batch."""
        self._validates = False
        place = self.turns.place
        if not (self.rested and self.trainer.should_stop):
            self.keep_stop()
            mine = self._wishes()
            place.wish = place.wish or bool(mine)
            if 0 < place.halt <= self.turns.batches:
                self._halt(mine)
        self.rested = False

    def stop_after_rest(self) -> None:
        """What a callback decided on a validation that all have seen."""
        if self.rested:
            self.trainer.should_stop = self.together(words.decide(self.office.rounds, self.trainer.should_stop, False))
        self.rested = False

    def rest_at_the_end(self) -> None:
        """Nothing is left on its way. No batch comes that all could save behind: who was told to be queued anew since
        the last rest says so here, for what the job does after the fit."""
        self.rest(drain=True)
        if self.meeting and self.together(words.decide(self.office.rounds, self._requeue.wanted, False)):
            with compat.behind_epoch(self.trainer):
                self._save_for_queue()

    def _wishes(self) -> Wish:
        wishes = Wish.STOP if self._stop and compat.can_stop_early(self.trainer) else Wish.NOTHING
        if self._requeue.wanted:
            wishes |= Wish.REQUEUE
        if self.global_rank == 0 and compat.is_time_to_validate(self.trainer):
            wishes |= Wish.VALIDATE
        return wishes | Wish.TERMINATE if self.office.flags.terminating else wishes

    def _halt(self, mine: Wish) -> None:
        """All are after the same batch, for what somebody wished."""
        said = self.together(self.office.rounds.agree(bytes([mine.value]), what="what is wished"))
        wishes = Wish(0)
        for word in said.values():
            wishes |= Wish(word[0])
        self.turns.go_on()
        self.halted = True
        if wishes & Wish.REQUEUE:
            self._save_for_queue()
        if wishes & Wish.TERMINATE:
            self.closing = True
            raise SIGTERMException()
        self.halted = False
        self.trainer.should_stop = bool(wishes & Wish.STOP)
        self._validates = bool(wishes & Wish.VALIDATE)

    def _save_for_queue(self) -> None:
        self._requeue.answer()
        compat.requeue(self.trainer, self._save_and_requeue)
