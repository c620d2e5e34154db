"""The stages rest around a validation, at the end of an epoch, at the very end, and where somebody saves by steps.

Between rests each runs free within the depth of its queues. At a rest the last stage tells the others what was logged,
so that whoever monitors a metric (EarlyStopping, ModelCheckpoint, ReduceLROnPlateau) finds it on every rank, and one
that is told to stop stops all. Gradients stay on their way over a rest; only a checkpoint drains the pipe.

This callback stands first in the Trainer's list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async.strategies import compat

if TYPE_CHECKING:
    from lightning_async.strategies.pipe_setup import PipeSetup


class Rests(Callback):
    """The strategy's ears in the loops."""

    def __init__(self, strategy: PipeSetup) -> None:
        self.strategy = strategy

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """All draw the same order of the data."""
        self.strategy.epoch_started()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A stop is heard before each batch."""
        self.strategy.listen()
        self.strategy.recording.clock(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is trained on. Who saves by steps may look at a metric."""
        self.strategy.batch_ended(outputs)
        if any(_saves_now(trainer, callback) for callback in compat.callbacks(trainer)):
            self.strategy.rest()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """One stage alone waits for nobody's hooks; several rest behind those of all (`_watch_loop`)."""
        if not self.strategy.piped:
            self.strategy.rest()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """All validate the same weights: those after the same batch."""
        self.strategy.rest()

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

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Its metrics are there for all."""
        self.strategy.rest()

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Likewise."""
        self.strategy.rest()

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        """All have done all batches."""
        self.strategy.rest()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Nothing is left on its way."""
        self.strategy.rest_at_the_end()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """First of all callbacks: after an exception nobody may wait for anybody."""
        self.strategy.give_up(exception)


def _saves_now(trainer: Trainer, callback: Callback) -> bool:
    every = compat.saves_every(callback) if isinstance(callback, ModelCheckpoint) else 0
    return every > 0 and trainer.global_step > 0 and trainer.global_step % every == 0
