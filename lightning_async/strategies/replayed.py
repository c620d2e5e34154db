"""A member of a recorded run, once more: the run's own strategy in a Trainer of its own, in another office.

    run      Trainer -- strategy -- Office         -- RecordingCarrier -- links        Feeding          <- the share
    replay   Trainer -- strategy -- ReplayedOffice -- ReplayCarrier    -- the log      RecordedFeeding  <- the log

Nothing of the training is written a second time: hooks, accumulation, clipping, precision and optimizers are
Lightning's, steps and meetings the strategy's. What depends on the others, on the clock or on a metric comes from the
log: messages, samples, learning rates, what counts less, where the members meet. What no log has (means of buffers) is
said in a `Hall`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_async.progress.progress import Outcome
from lightning_async.strategies import compat
from lightning_async.strategies.base import AsyncStrategy
from lightning_async.strategies.clock import Clock
from lightning_async.strategies.compat import Leash
from lightning_async.strategies.course import WrongInput
from lightning_async.strategies.feeding import Feeding
from lightning_async.strategies.meetings import Meetings
from lightning_async.strategies.replayed_feeding import DrawnFeeding, RecordedFeeding
from lightning_async.strategies.replayed_office import ReplayedOffice
from lightning_async.strategies.replaying import Replaying
from lightning_async.transport.hall import Hall
from lightning_async.transport.log import Log
from lightning_async.transport.replay import ReplayCarrier


class RecordedClock(Clock):
    """The run's counts are in the log: nobody counts, and nothing falls due.

    Args:
        strategy: Whose.
        replaying: Knows what was done in the run.
        late: Whether batches of a stream were fetched late there.
    """

    def __init__(self, strategy: AsyncStrategy, replaying: Replaying, *, late: bool) -> None:
        super().__init__(strategy, None)
        self._replaying, self._late = replaying, late

    @property
    def fetches_late(self) -> bool:
        """As in the run."""
        return self._late

    def take(self, trainer: Trainer) -> None:
        """This Trainer was told nothing that counts."""

    def hold(self, trainer: Trainer, leash: Leash, meeting: Callable[[], bool]) -> None:
        """There are no callbacks that could act by themselves. Loaders are drawn from at the same points."""

        def as_in_the_run() -> None:
            if compat.reloads(trainer):
                self._strategy.feeding.replace()
            setup_data()
            self.expect(trainer)
            if self._late:
                compat.fetch_late(trainer)

        setup_data = leash.wrap(trainer.fit_loop, "setup_data", as_in_the_run)

    def expect(self, trainer: Trainer) -> None:
        """The length that was foreseen; the log says when an epoch ended."""
        length = self._replaying.told("length", math.inf)
        trainer.fit_loop.max_batches = length if self.progress is None else math.inf

    def begin(self, trainer: Trainer) -> None:
        """No count of Lightning's own ends an epoch."""
        super().begin(trainer)
        trainer.fit_loop.max_batches = math.inf

    def batch_started(self, trainer: Trainer) -> None:
        """Counts: see `Replaying.clock`."""
        if self._replaying.mark("ahead"):
            compat.look_ahead(trainer)

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
        if self._replaying.mark("cut"):
            self._strategy.feeding.cut()
        if self._replaying.mark("further"):
            compat.look_ahead(trainer)


class RecordedMeetings(Meetings):
    """The members meet where they met, and train as long as they trained."""

    def __init__(self, strategy: AsyncStrategy, replaying: Replaying, log: Log) -> None:
        super().__init__(strategy)
        self._replaying = replaying
        self._epochs = log.number_of_epochs()
        self._last, self._trained = set(log.last_batches()), log.batches()
        self._name, self._batches = log.name, 0

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
        if self._batches not in self._last and self._batches < self._trained:
            raise WrongInput(
                f"the training data of {self._name} end behind its batch {self._batches}, in the "
                "middle of an epoch of the run: they are others, or do not begin where they began"
            )
        self.strategy.feeding.under_way = False
        while self._replaying.meets():
            self.strategy.set_off()
            self.strategy.meet()
        self._epochs -= 1
        trainer.should_stop = self._epochs <= 0

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """They met already, if they did."""


def seat(strategy: AsyncStrategy, replaying: Replaying, carrier: ReplayCarrier, hall: Hall, begin: Any) -> None:
    """Give a strategy what it takes part in a replay with, before its Trainer is made."""
    fed: Callable[..., Feeding] = RecordedFeeding if begin["fed"] == "numbers" else DrawnFeeding
    strategy.office = ReplayedOffice(carrier, replaying, hall)
    strategy.feeding = fed(carrier, replaying, begin["mass"])
    strategy.clock = RecordedClock(strategy, replaying, late=begin["late"])
    strategy.checkpoints.parts["progress"] = strategy.clock
    if begin["shrink"] is not None:
        strategy.shrink = replaying.shrink
    replaying.strategy = strategy


def seated(kind: type[AsyncStrategy]) -> type[AsyncStrategy]:
    """The strategy, for members of one process."""

    class Seated(kind):  # type: ignore[misc,valid-type]
        """Has nobody to connect to."""

        def setup_distributed(self) -> None:
            """No process group: the hall takes its place."""

        def _ranks_of_members(self) -> tuple[tuple[int, ...], ...]:
            """As in the run."""
            found: tuple[tuple[int, ...], ...] = self.office.ranks_of_members
            return found

        def load_checkpoint(self, *arguments: Any, **options: Any) -> dict[str, Any]:
            """Lightning holds a lock meanwhile, for which the others would wait: each member reads its part alone."""
            with self.office.alone():
                loaded: dict[str, Any] = super().load_checkpoint(*arguments, **options)
            self.office.recording.goes_on(loaded["loops"]["fit_loop"])
            return loaded

    return Seated
