"""A member of a recorded run, once more: the run's own strategy in a Trainer of its own, in another office.

    run      Trainer -- strategy -- Office         -- RecordingCarrier -- links        Feeding          <- the share
    replay   Trainer -- strategy -- ReplayedOffice -- ReplayCarrier    -- the log      RecordedFeeding  <- the log

Nothing of the training is written a second time: hooks, accumulation, clipping, precision and optimizers are
Lightning's, steps and meetings the strategy's. What depends on the others, on the clock or on a metric comes from the
log: messages, samples, learning rates, where the members meet. What no log has (means of buffers) is said in a `Hall`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_async.data.loader import is_shareable, recorded_loader
from lightning_async.progress.progress import Outcome
from lightning_async.strategies.base import AsyncStrategy
from lightning_async.strategies.clock import Clock
from lightning_async.strategies.course import WrongInput
from lightning_async.strategies.feeding import Feeding, size_of
from lightning_async.strategies.meetings import Meetings
from lightning_async.strategies.office import PAGES, Office
from lightning_async.strategies.replaying import Replaying
from lightning_async.strategies.waiting import Flags
from lightning_async.transport.cluster import ClusterCarrier
from lightning_async.transport.hall import Hall, Seat
from lightning_async.transport.log import Log
from lightning_async.transport.mail import Carrier, Wait
from lightning_async.transport.pages import Pages
from lightning_async.transport.replay import ReplayCarrier
from lightning_async.transport.rounds import Rounds

T = TypeVar("T")


class ReplayedOffice(Office):
    """A place in a run that is over: the mail is in the log, the others are in the hall."""

    def __init__(self, carrier: ReplayCarrier, replaying: Replaying, hall: Hall) -> None:
        super().__init__(interface=None, silence=1.0, patience=1.0, limit=math.inf, record=None)
        self.recording = replaying
        self._replayed, self._hall = carrier, hall
        self._seat = Seat(hall, carrier.me, carrier.world)

    def open(
        self, environment: ClusterEnvironment | None, me: int, world: int, device: torch.device, *, fitting: bool
    ) -> None:
        """Sit down."""
        self._carrier = cast(ClusterCarrier, self._seat)  # all that is asked of it here is what every carrier can
        self.flags = Flags(self._seat)
        self._pages = Pages(self._seat, PAGES)
        self.rounds = Rounds(self._seat)
        self.mail: Carrier = self._replayed
        self.algorithms_rounds = Rounds(self._replayed, channel=1)

    def drive(self, waiting: Wait[T], sign: Callable[[], object] | None = None) -> T:
        """What waits for the log goes on at once, what waits for the hall lets the others do something."""
        asked = self._replayed.asked
        try:
            while True:
                word = next(waiting)
                if self._replayed.asked == asked:
                    self._hall.stage.rest(word)
                asked = self._replayed.asked
        except StopIteration as end:
            result: T = end.value
            return result

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Rounds without the others, for what all decide alike."""
        rounds, me = self.rounds, self._seat.me
        self.rounds = Rounds(Seat(Hall(self._hall.stage, {me}), me, self._seat.world))
        try:
            yield
        finally:
            self.rounds = rounds

    def check_network(self, nodes: int) -> None:
        """There is none."""

    def announce(self, exception: BaseException) -> None:
        """Nobody waits for a member that failed: the stage ends all."""

    def traffic(self) -> dict[Any, Any]:
        """None."""
        return {}

    def close(self) -> None:
        """Stand up."""
        if self.is_open:
            self._carrier = None
            self._seat.leave()
            self.recording.close()


class RecordedFeeding(Feeding):
    """Feeds the recorded batches."""

    def __init__(self, carrier: ReplayCarrier, replaying: Replaying, mass: int) -> None:
        super().__init__("equal")
        self._replaying, self._recorded_mass = replaying, mass
        self._coming = iter(carrier.epochs())
        self._fetched: deque[list[Any]] = deque()

    @property
    def mass(self) -> int:
        """What a step of this member weighed."""
        return self._recorded_mass

    def share_out(self, loader: object, office: Office, epoch: Callable[[], int]) -> object:
        """A loader like the user's, with the recorded batches."""
        if not is_shareable(loader):
            raise WrongInput(
                f"the training data are a {type(loader).__name__} here, but the recorded samples are numbers: give a "
                "DataLoader on a data set with numbered samples"
            )
        assert isinstance(loader, DataLoader)
        size, single, recording = size_of(loader), loader.batch_sampler is None, office.recording

        def began() -> None:
            recording.epoch(epoch(), size)

        return recorded_loader(loader, _Batches(self, began, recording.fetched, single=single))

    def next_epoch(self) -> Iterator[list[Any]]:
        """The batches of the next epoch; what was fetched before is not trained on any more."""
        self._fetched.clear()
        for batch in next(self._coming, []):
            self._fetched.append(batch)
            yield batch

    def completed(self, batch: object = None) -> None:
        """The oldest batch was trained on."""
        if self._fetched:
            self._replaying.samples = self._fetched.popleft()
            self.batches += 1
            self.samples += len(self._replaying.samples)


class _Batches:
    """A batch sampler that says what it does. It has no length, as in the run: Lightning fetches ahead."""

    def __init__(
        self, feeding: RecordedFeeding, began: Callable[[], None], fetched: Callable[[Any], None], *, single: bool
    ) -> None:
        self._feeding, self._began, self._fetched, self._single = feeding, began, fetched, single

    def __iter__(self) -> Iterator[Any]:
        self._began()
        for batch in self._feeding.next_epoch():
            self._fetched(batch)
            yield batch[0] if self._single else batch


class RecordedClock(Clock):
    """The run's counts are in the log: nobody counts, and nothing falls due."""

    def __init__(self, strategy: AsyncStrategy) -> None:
        super().__init__(strategy, None)

    def take(self, trainer: Trainer) -> None:
        """This Trainer was told nothing that counts."""

    def batch_started(self, trainer: Trainer) -> None:
        """See `Replaying.clock`."""

    def batch_ended(self, trainer: Trainer, samples: int) -> bool:
        """See `RecordedMeetings`."""
        return False

    def summon(self, trainer: Trainer) -> None:
        """All come to where they met."""

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
        while self._replaying.meets():
            self.strategy.set_off()
            self.strategy.meet()
        self._epochs -= 1
        trainer.should_stop = self._epochs <= 0

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """They met already, if they did."""


class Place(ClusterEnvironment):
    """One of several members in one process."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self._rank, self._world = rank, world

    creates_processes_externally = True
    main_address = "nowhere"
    main_port = 0

    @staticmethod
    def detect() -> bool:
        """Nobody finds it by chance."""
        return False

    def world_size(self) -> int:
        """How many members there were."""
        return self._world

    def set_world_size(self, size: int) -> None:
        """That cannot be changed."""

    def global_rank(self) -> int:
        """Which of them this is."""
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """That cannot be changed."""

    def local_rank(self) -> int:
        """The only one on its device."""
        return 0

    def node_rank(self) -> int:
        """The only node."""
        return 0


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
