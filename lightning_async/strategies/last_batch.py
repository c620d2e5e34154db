"""Which batch is the last of its epoch is Lightning's to know before it, and ours: by the agenda, or by a stream's end.

before the batch    the agenda ends the epoch with it: foretold    else a stream is asked whether it goes on
all have met        it does: streams are cut there                 it does not, a member's stream ended before its
                                                                   part: taken back, the others go on
no batch comes      the one before was the last: its stream had less than its length, or nothing at all
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from lightning_async.strategies import compat
from lightning_async.strategies.counts import Counts

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy


class LastBatch:
    """What one rank knows of it.

    Args:
        strategy: Whose.
        counts: What the Trainer was told.

    Attributes:
        foretold: Whether the epoch is over with the batch under way, if all do their parts by then.
    """

    def __init__(self, strategy: AsyncStrategy, counts: Counts) -> None:
        self._strategy, self._counts = strategy, counts
        self.foretold = False

    @property
    def fetches_late(self) -> bool:
        """Whether a batch of a stream is fetched only when it is known that the epoch has one more (`compat`)."""
        return self._counts.cuts(self._strategy.feeding)

    def started(self, trainer: Trainer, *, by_agenda: bool) -> None:
        """A batch begins, by the agenda the last one; a stream may have ended before its part."""
        batches = trainer.fit_loop.epoch_loop.batch_progress
        if not by_agenda:
            self._look_ahead(trainer, "ahead")
        elif not batches.is_last_batch:
            batches.is_last_batch = self.foretold = True

    def ended(self, trainer: Trainer) -> bool:
        """Whether this rank's own data ended with the batch that was trained on."""
        return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and not self.foretold

    def met(self, trainer: Trainer, *, by_agenda: bool) -> bool:
        """All know whether the agenda ended the epoch; whether this rank's stream ends though the others' go on."""
        batches = trainer.fit_loop.epoch_loop.batch_progress
        foretold, self.foretold = self.foretold, False
        if by_agenda and (foretold or not batches.is_last_batch):
            self._strategy.office.recording.mark("cut")
            self._strategy.feeding.cut()
            _was_last(trainer)
        elif foretold:
            batches.is_last_batch = False
            self._look_ahead(trainer, "further")
            if batches.is_last_batch:
                _was_last(trainer)
                return True
        return False

    def ran_dry(self, trainer: Trainer) -> None:
        """The epoch is over on this rank; a stream that has less than its length says so by ending, and not before."""
        feeding, batches = self._strategy.feeding, trainer.fit_loop.epoch_loop.batch_progress
        left, self.foretold = self.foretold, False  # a -1 of `on_train_batch_start`
        if left or (feeding.share is None and feeding.dry and not batches.is_last_batch):
            _was_last(trainer)

    def came_empty(self, trainer: Trainer) -> None:
        """The epoch is over on this rank, which had no batch in it: schedules by epoch go on, as the others' do."""
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            _was_last(trainer)

    def forget(self) -> None:
        """The run is over, perhaps by an error within a batch that was foretold."""
        self.foretold = False

    def _look_ahead(self, trainer: Trainer, mark: str) -> None:
        """Where Lightning may not: when that was is in the log."""
        if self.fetches_late:
            self._strategy.office.recording.mark(mark)
            compat.look_ahead(trainer)


def _was_last(trainer: Trainer) -> None:
    """The batch that was trained on, if any, was the last one of the epoch, and Lightning did not know it."""
    loop = trainer.fit_loop.epoch_loop
    loop.batch_progress.is_last_batch = True
    loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
