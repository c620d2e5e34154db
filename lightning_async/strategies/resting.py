"""Where all stages stop after the same batch: they hear what the last one logged, and whether to go on.

A callback, a hook or a user that sets `should_stop` on one rank in mid-epoch may not stop that rank alone: the others
would wait for it. At a rest all agree; between rests the wish travels with the batches (`place`).
"""

from __future__ import annotations

import torch

from lightning_async.strategies import words
from lightning_async.strategies.pipe_saving import PipeSaving


class Resting(PipeSaving):
    """The rests of one rank."""

    rested = False

    def rest(self, *, drain: bool = False) -> None:
        """All stages are after the same batch; all know what the last one logged, and whether to stop."""
        if not self.meeting:
            return
        turns, trainer = self.turns, self.trainer
        self.telling.arrive()
        self.together(turns.place.rest(turns.batches + turns.passes))
        if drain:  # behind the word that all are here: a drain alone would wait for who trains on
            turns.drain()
        self.together(self.tell())
        mine = {key: float(value) for key, value in trainer.callback_metrics.items()}
        known = self.together(words.broadcast(self.office.rounds, mine, 0))
        if self.global_rank != 0:
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in known.items()})
        wish = trainer.should_stop or turns.place.wish or turns.place.halt > 0
        trainer.should_stop = self.together(words.decide(self.office.rounds, wish, False))
        self.rested = True

    def stop_together(self) -> None:
        """One that wishes to stop in mid-epoch may not do so alone: all stop after the same batch."""
        place, trainer = self.turns.place, self.trainer
        if not (self.rested and trainer.should_stop):
            place.wish = place.wish or trainer.should_stop
            trainer.should_stop = 0 < place.halt <= self.turns.batches
        self.rested = False

    def stop_after_rest(self) -> None:
        """What a callback decided on a validation that all have seen."""
        if self.rested:
            self.trainer.should_stop = self.together(words.decide(self.office.rounds, self.trainer.should_stop, False))
        self.rested = False
