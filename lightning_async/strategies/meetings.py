"""Where the ranks meet: at a batch that the agenda names, at the end of an epoch, before validation, at the very end.

    on_train_batch_start .. free running .. MEETING: validation, metrics, checkpoints | next batch: free

Strategies have no hooks of their own at these points, so this callback stands first in the Trainer's list and calls the
strategy. Whichever point comes first opens the meeting; the others find it open.

A rank that has no more batches in its epoch while others have comes to all their meetings until theirs is over too, and
does there what Lightning's loop does for them: save, stop, validate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_async.progress.report import Wish
from lightning_async.strategies import compat
from lightning_async.strategies.bar import EVERY, show_total

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy


class Meetings(Callback):
    """The strategy's ears in the training loop."""

    def __init__(self, strategy: AsyncStrategy) -> None:
        self.strategy = strategy
        self._drew = False
        self._foreseen = 0  # batches of this epoch, as the bar says

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Whatever an earlier fit was in the middle of, and foresaw."""
        self._drew, self._foreseen = False, 0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Free again; foresee the epoch's end now and then. What the last step sends leaves beside this compute."""
        self._drew = self.strategy.feeding.under_way = True
        self.strategy.set_off()
        self.strategy.listen()
        self.strategy.stepping.batch_started()
        self.strategy.clock.batch_started(trainer)
        self.strategy.office.recording.clock(trainer)
        share = self.strategy.feeding.share
        if share is not None and (batch_idx % EVERY == 0 or batch_idx >= self._foreseen):
            self._foreseen = max(share.expected_batches(), batch_idx + 1)
            show_total(trainer, self._foreseen)
        self.strategy.office.send()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is trained on; the last one of an epoch, or one that was appointed, opens the meeting."""
        self.strategy.office.recording.loss(outputs)
        meets = self.strategy.batch_ended(batch)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and self.strategy.feeding.share is not None:
            show_total(trainer, batch_idx + 1)
        if meets:
            self._meet(trainer)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Validation sees the consensus."""
        self._meet(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A stop is heard during validation too."""
        self.strategy.listen()

    def on_test_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Likewise."""
        self.strategy.listen()

    def on_predict_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Likewise."""
        self.strategy.listen()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Epochs that ended without a meeting (a -1 of the user's) meet too; who ended early waits for the others."""
        self.strategy.feeding.under_way = False
        progress, clock = self.strategy.clock.progress, self.strategy.clock
        waited = clock.waited
        if progress is not None and self._came_empty(trainer):
            progress.ended, clock.over = True, False
            if not waited:  # else it was through with the epoch when the run was saved, and its schedules too
                clock.came_empty(trainer)
        if progress is not None and self.strategy.free:
            clock.ran_dry(trainer)
            progress.ended = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            self._attend(trainer, module)
        while progress is not None and progress.ended and not clock.over and not _stops(trainer):
            self.strategy.set_off()
            self._attend(trainer, module)
        self._tell_apart()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """All take the consensus home."""
        self.strategy.apart = False
        self._meet(trainer)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """First of all callbacks: after an exception nobody may wait for anybody."""
        self.strategy.give_up(exception)

    def _meet(self, trainer: Trainer) -> None:
        if not self.strategy.free:
            return
        wishes = self.strategy.meet()
        if wishes & Wish.REQUEUE:
            self.strategy.clock.requeued(trainer)
        if wishes & Wish.TERMINATE:
            self.strategy.close_in_order()

    def _came_empty(self, trainer: Trainer) -> bool:
        """Whether this rank's loader yielded nothing at all in this epoch, and nobody has heard of it."""
        drew, waited = self._drew, self.strategy.clock.waited
        self._drew = self.strategy.clock.waited = False
        return not drew and (waited or (self.strategy.feeding.dry and not trainer.fit_loop.restarting))

    def _tell_apart(self) -> None:
        """What training logs of an epoch is combined over all ranks, and one that did not train logged nothing: then
        each has its own."""
        if empty := self.strategy.clock.empty:
            self.strategy.apart = True
            rank_zero_warn(
                f"rank {', '.join(map(str, empty))} had no batch in this epoch: what training logged over the epoch "
                "with `sync_dist=True`, or as a torchmetric, is each rank's own"
            )

    def _attend(self, trainer: Trainer, module: LightningModule) -> None:
        """Meet, and do what the loop does for those who met after a batch."""
        clock = self.strategy.clock
        with compat.within_epoch(trainer):
            with compat.within_batch(trainer):
                self._meet(trainer)
                for callback in compat.callbacks(trainer):
                    if isinstance(callback, (ModelCheckpoint, Timer)):
                        callback.on_train_batch_end(trainer, module, None, None, 0)
            clock.closing.before_validation(trainer)
            stops = trainer.should_stop and compat.can_stop_early(trainer)
            if clock.validating or (stops and compat.validates_in_this_epoch(trainer)):
                compat.validate(trainer)
            clock.closing.after_validation(trainer)


def _stops(trainer: Trainer) -> bool:
    """Whether the others leave the loop here: this rank's epoch is not more over than theirs."""
    with compat.within_epoch(trainer):
        return trainer.should_stop and compat.can_stop_early(trainer)
