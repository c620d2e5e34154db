"""All stop at a meeting, or none: they are asked once, where a stop of one rank alone would part it from the others.

    on_train_batch_end    who comes behind us may tell one rank to stop
       [ asked here       if a stop would bring a validation that is not due ]
    validation            if one is due: the same
       [ asked here       in mid-epoch, where the others would train on ]
    on_train_epoch_end    the same
       [ asked here       at the end of an epoch, which all leave anyway, but not the run ]
    next batch            all say what they train, unless nothing could change it since they were asked

Who was told to end (SIGTERM) says so here too: a save or a validation that is under way comes to its end, as long as
`grace` lasts, and then all stop at one point, where they can save.

In mid-epoch no hook comes between the question and the next batch. So the answer tells what all train too, and takes
the place of the word that they would give there: to be asked costs nothing. Nobody is asked before all have met once: a
run may go on with one rank at the end of its epoch, where the loop does not take the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from lightning_async.progress.report import Wish
from lightning_async.strategies import compat
from lightning_async.strategies.trainable import all_unchanged, trained_word

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy


class Closing:
    """How one rank comes to the end of a meeting.

    Args:
        strategy: Whose.
        keep: Called where this rank is by itself: what tells it to stop is a wish.

    Attributes:
        settled: Whether all train what they trained before, and have said so.
    """

    def __init__(self, strategy: AsyncStrategy, keep: Callable[[Trainer], None]) -> None:
        self._strategy, self._keep = strategy, keep
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
            self._keep(trainer)
        elif not self._validating and compat.validates_in_this_epoch(trainer):
            self._ask(trainer)

    def after_validation(self, trainer: Trainer) -> None:
        """The next batch follows, if the epoch is not over and this rank is not to stop."""
        if not self._open:
            self._keep(trainer)
        elif not self._over:
            self._ask(trainer)

    def after_epoch(self, trainer: Trainer) -> None:
        """All hooks of the epoch are done; the next one follows, if this rank is not to stop."""
        if not self._open:
            self._keep(trainer)
            return
        self._asked = False  # hooks of the epoch came since
        self._ask(trainer)

    @property
    def _open(self) -> bool:
        return self._strategy.meeting and self._met

    def _ask(self, trainer: Trainer) -> None:
        """Who is told to stop? One question at a time, and none where all know."""
        if self._asked or self._stops:
            return
        self._asked = True
        strategy = self._strategy
        wish = Wish.STOP if trainer.should_stop and compat.can_stop_early(trainer) else Wish.NOTHING
        if strategy.office.flags.told_to_end:
            wish |= Wish.TERMINATE
        word = bytes([wish.value]) + trained_word(trainer.lightning_module, strategy.replica)
        words = strategy.together(strategy.office.rounds.agree(word, what="who is told to stop"))
        wishes = [Wish(said[0]) for said in words.values()]
        if any(wish & Wish.TERMINATE for wish in wishes):
            strategy.close_in_order()
        self._stops = any(wish & Wish.STOP for wish in wishes)
        trainer.should_stop = self._stops or trainer.should_stop
        self.settled = not self._over and all_unchanged([said[1:] for said in words.values()])
