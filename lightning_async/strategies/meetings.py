"""Where the ranks meet: at the last batch of an epoch, before validation, at the end of an epoch and of the training.

    on_train_batch_start .. free running .. last batch | MEETING: validation, metrics, checkpoints | next batch: free

Strategies have no hooks of their own at these points, so this callback stands first in the Trainer's list and calls the
strategy. Whichever point comes first opens the meeting; the others find it open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_async.strategies.progress import EVERY, show_total

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy


class Meetings(Callback):
    """The strategy's ears in the training loop."""

    def __init__(self, strategy: AsyncStrategy) -> None:
        self.strategy = strategy

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Free again; foresee the end of the epoch now and then."""
        self.strategy.set_off()
        self.strategy.listen()
        if batch_idx % EVERY == 0 and (share := self.strategy.feeding.share) is not None:
            show_total(trainer, batch_idx, share.expected_batches())

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is trained on; the last one of an epoch opens the meeting."""
        self.strategy.office.recording.loss(outputs)
        self.strategy.batch_ended()
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if last and self.strategy.feeding.share is not None:
            show_total(trainer, batch_idx, batch_idx + 1)
        if last:
            self.strategy.meet()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Validation sees the consensus."""
        self.strategy.meet()

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A stop is heard during validation too."""
        self.strategy.listen()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Epochs without validation end with a meeting too."""
        self.strategy.meet()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """All take the consensus home."""
        self.strategy.meet()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """First of all callbacks: after an exception nobody may wait for anybody."""
        self.strategy.give_up(exception)
