"""A member of a recorded run, once more: the run's own strategy in a Trainer of its own, in another office.

    run      Trainer -- strategy -- Office         -- RecordingCarrier -- links        Feeding          <- the share
    replay   Trainer -- strategy -- ReplayedOffice -- ReplayCarrier    -- the log      RecordedFeeding  <- the log

Nothing of the training is written a second time: hooks, accumulation, clipping, precision and optimizers are
Lightning's, steps and meetings the strategy's. What depends on the others, on the clock or on a metric comes from the
log: messages, samples, learning rates, where the members meet. What no log has (means of buffers) is said in a `Hall`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_async.progress.progress import Outcome
from lightning_async.strategies.base import AsyncStrategy
from lightning_async.strategies.clock import Clock
from lightning_async.strategies.compat import Leash
from lightning_async.strategies.meetings import Meetings
from lightning_async.strategies.replayed_feeding import RecordedFeeding
from lightning_async.strategies.replayed_office import ReplayedOffice
from lightning_async.strategies.replaying import Replaying
from lightning_async.transport.hall import Hall
from lightning_async.transport.log import Log
from lightning_async.transport.replay import ReplayCarrier


class RecordedClock(Clock):
    """The run's counts are in the log: nobody counts, and nothing falls due."""

    def __init__(self, strategy: AsyncStrategy) -> None:
        super().__init__(strategy, None)

    def take(self, trainer: Trainer) -> None:
        """This Trainer was told nothing that counts."""

    def hold(self, trainer: Trainer, leash: Leash, meeting: Callable[[], bool]) -> None:
        """There are no callbacks that could act by themselves."""

    def batch_started(self, trainer: Trainer) -> None:
        """See `Replaying.clock`."""

    def batch_ended(self, trainer: Trainer, samples: int) -> bool:
        """See `RecordedMeetings`."""
        return False

    def heed(self) -> None:
        """Nobody is waited for who might not come."""

    def summon(self, trainer: Trainer) -> None:
        """All come to where they met."""

    def set_out(self, trainer: Trainer, roll_call: Callable[[], Outcome]) -> None:
        """See `RecordedMeetings`."""
        roll_call()

    def conclude(self, trainer: Trainer, outcome: Outcome) -> None:
        """What came of the meeting is in the log."""


class RecordedMeetings(Meetings):
    """The members meet where they met, and train as long as they trained."""

    def __init__(self, strategy: AsyncStrategy, replaying: Replaying, log: Log) -> None:
        super().__init__(strategy)
        self._replaying = replaying
        self._epochs = log.number_of_epochs()
        self._last = set(log.last_batches())
        self._batches = 0

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Learning rates come from the log; a scheduler may go by a metric that nobody computes here."""
        if module.automatic_optimization:
            self.strategy.lr_scheduler_configs = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is trained on; perhaps they met behind it, perhaps the epoch was over."""
        self._batches += 1
        self._replaying.loss(outputs)
        self.strategy.batch_ended(batch)
        trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = self._batches in self._last
        if self._replaying.meets():
            self.strategy.meet()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Who ended early came to the meetings of the others. Perhaps it was the last epoch."""
        self.strategy.feeding.under_way = False
        while self._replaying.meets():
            self.strategy.set_off()
            self.strategy.meet()
        self._epochs -= 1
        trainer.should_stop = self._epochs <= 0

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """They met already, if they did."""


def seat(strategy: AsyncStrategy, replaying: Replaying, carrier: ReplayCarrier, hall: Hall, mass: int) -> None:
    """Give a strategy what it takes part in a replay with, before its Trainer is made."""
    strategy.office = ReplayedOffice(carrier, replaying, hall)
    strategy.feeding = RecordedFeeding(carrier, replaying, mass)
    strategy.clock = strategy.checkpoints.parts["progress"] = RecordedClock(strategy)
    replaying.strategy = strategy


def seated(kind: type[AsyncStrategy]) -> type[AsyncStrategy]:
    """The strategy, for members of one process."""

    class Seated(kind):  # type: ignore[misc,valid-type]
        """Has nobody to connect to."""

        def setup_distributed(self) -> None:
            """No process group: the hall takes its place."""

        def load_checkpoint(self, *arguments: Any, **options: Any) -> dict[str, Any]:
            """Lightning holds a lock meanwhile, for which the others would wait: each member reads its part alone."""
            with self.office.alone():
                return super().load_checkpoint(*arguments, **options)  # type: ignore[no-any-return]

    return Seated
