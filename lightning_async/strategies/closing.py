"""All stop at a meeting, or none: they are asked once, where a stop of one rank alone would part it from the others.

    on_train_batch_end    who comes behind us may tell one rank to stop
       [ asked here       if a stop would bring a validation that is not due ]
    validation            if one is due: the same
       [ asked here       in mid-epoch, where the others would train on ]
    on_train_epoch_end    the same
       [ asked here       at the end of an epoch, which all leave anyway, but not the run, or not without a save ]
    next batch            all say what they train, unless nothing could change it since they were asked

Who was told to end (SIGTERM) says so here too: a save or a validation that is under way comes to its end, as long as
`grace` lasts, and then all stop at one point, where they can save. Who was told to be queued anew (SLURM's signal) says
so too, and all save here: behind the very last validation as well, for what the job does after the fit.

In mid-epoch no hook comes between the question and the next batch. So the answer tells what all train too, and takes
the place of the word that they would give there: to be asked costs nothing. Nobody is asked before all have met once: a
run may go on with one rank at the end of its epoch, where the loop does not take the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from lightning_async.progress.report import Wish
from lightning_async.strategies import compat
from lightning_async.strategies.trainable import all_unchanged, trained_word
from lightning_async.strategies.wishes import Wishes

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy


class Closing:
    """How one rank comes to the end of a meeting.

    Args:
        strategy: Whose.
        wishes: What this rank is told. Where it is by itself, to stop is a wish.

    Attributes:
        settled: Whether all train what they trained before, and have said so.
    """

    def __init__(self, strategy: AsyncStrategy, wishes: Wishes) -> None:
        self._strategy, self._wishes = strategy, wishes
        self.forget()

    def forget(self) -> None:
        """The run is over. Idempotent."""
        self._met = self._asked = self._stops = self._over = self._validating = self.settled = False

    def begin(self, *, stops: bool, over: bool, validating: bool) -> None:
        """All have met, and know: whether all were told to stop, their epoch is over, a validation follows."""
        self._met, self._asked, self.settled = True, False, False
        self._stops, self._over, self._validating = stops, over, validating

    def before_validation(self, trainer: Trainer) -> None:
        """All hooks of the batch are done; a validation follows if it is due, or if this rank is to stop."""
        if not self._open:
            self._wishes.keep_stop(trainer)
        elif not self._validating and compat.validates_in_this_epoch(trainer):
            self._ask(trainer)

    def after_validation(self, trainer: Trainer) -> None:
        """The next batch follows, if the epoch is not over and this rank is not to stop."""
        if not self._open:
            self._wishes.keep_stop(trainer)
        elif not self._over:
            self._ask(trainer)

    def after_epoch(self, trainer: Trainer) -> None:
        """All hooks of the epoch are done; the next one follows, or the end of the run."""
        if not self._open:
            self._wishes.keep_stop(trainer)
            return
        self._asked = False  # hooks of the epoch came since
        with compat.behind_epoch(trainer):
            self._ask(trainer, at_end=True)

    @property
    def _open(self) -> bool:
        return self._strategy.meeting and self._met

    def _ask(self, trainer: Trainer, *, at_end: bool = False) -> None:
        """Who is told to stop? One question at a time, and none where all know: but at the end all may have to save."""
        if self._asked or (self._stops and not at_end):
            return
        self._asked = True
        wishes, unchanged = self._question(trainer)
        while wishes & Wish.REQUEUE and (at_end or not self._over):
            self._strategy.clock.requeued(trainer)
            wishes, unchanged = self._question(trainer)  # anew: hooks of the save came since
        if wishes & Wish.TERMINATE:
            self._strategy.close_in_order()
        self._stops = self._stops or bool(wishes & Wish.STOP)
        trainer.should_stop = self._stops or trainer.should_stop
        self.settled = not self._over and unchanged

    def _question(self, trainer: Trainer) -> tuple[Wish, bool]:
        """What anybody was told, and whether all train what they trained."""
        strategy, mine = self._strategy, self._wishes.told(trainer)
        word = bytes([mine.value]) + trained_word(trainer.lightning_module, strategy.replica)
        words = strategy.together(strategy.office.rounds.agree(word, what="who is told to stop"))
        wishes = Wish.NOTHING
        for said in words.values():
            wishes |= Wish(said[0])
        return wishes, all_unchanged([said[1:] for said in words.values()])
