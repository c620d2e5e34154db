"""Lightning's counts are the run's: a step is a batch of every member, wherever each of them is by itself.

    Trainer's arguments --begin--> agenda --appointments--> MEETING --outcome--> Lightning's own loop does what is due
                                     progress --each batch--> global_step, the loggers' step, schedulers by step

    max_steps, every_n_train_steps, val_check_interval, limit_train_batches     counts: an appointment ahead of each
    max_time, train_time_interval, val_check_interval as a time                 the first rank's clock calls a meeting
    should_stop, a signal                                                       whoever sees it calls a meeting

While a run lasts the counts that Lightning would take for one rank's are set so that it never acts on them by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from lightning_async.progress.agenda import Agenda, Due, Item
from lightning_async.progress.progress import Outcome, Progress
from lightning_async.progress.report import Wish
from lightning_async.progress.tally import Tally, Unit
from lightning_async.strategies import compat
from lightning_async.strategies.schedules import Schedules

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy

NEVER = 2**62
"""A batch before which Lightning never validates by itself."""
PROGRESS = 1
"""The page of a member's note that is the progress's."""


class Clock:
    """The run's progress, in Lightning's words.

    Args:
        strategy: Whose.
        meet_every: Samples of all members between two meetings; None: only where something else asks for one.
    """

    def __init__(self, strategy: AsyncStrategy, meet_every: int | None) -> None:
        if meet_every is not None and (
            not isinstance(meet_every, int) or isinstance(meet_every, bool) or meet_every < 1
        ):
            raise ValueError(f"`meet_every` must be an integer of at least 1 (samples), or None, got {meet_every!r}")
        self.progress: Progress | None = None
        self.over = self.validating = self.requeue = False
        self.meeting: Callable[[], bool] = _nowhere
        self._strategy = strategy
        self._meet_every = meet_every
        self._schedules = Schedules()
        self._restored: dict[str, Any] = {}
        self._counts: dict[str, Any] = {}
        self._val_every: int | float = 1.0
        self._val_seconds: float | None = None
        self._validated = 0.0
        self._at_end = True
        self._written = self._logged = self._shown = 0

    # -- set-up -------------------------------------------------------------------------------------------------------

    def take(self, trainer: Trainer) -> None:
        """Take over the counts that Lightning would read as one rank's. Before the loaders are made."""
        if compat.fast_dev_run(trainer) or trainer.limit_train_batches == 0:
            return
        self._val_seconds = compat.take_val_seconds(trainer)
        if self._val_seconds is not None:
            trainer.val_check_interval = 1.0  # else Lightning has no such attribute
        self._counts = {name: getattr(trainer, name) for name in ("limit_train_batches", "val_check_interval")}
        self._val_every = trainer.val_check_interval
        self._strategy.feeding.limit = trainer.limit_train_batches
        trainer.limit_train_batches = trainer.val_check_interval = 1.0

    def hold(self, trainer: Trainer, leash: compat.Leash, meeting: Callable[[], bool]) -> None:
        """Keep callbacks from acting by one rank's count or clock: between meetings they are not asked."""
        self.meeting = meeting

        def then_expect() -> None:
            setup_data()
            self.expect(trainer)

        setup_data = leash.wrap(trainer.fit_loop, "setup_data", then_expect)
        self._requeue = leash.replace("_signal_connector._slurm_sigusr_handler_fn", self._wants_requeue)
        for callback in compat.callbacks(trainer):
            if isinstance(callback, (ModelCheckpoint, Timer)):
                _ask_at_meetings(leash, callback, self)

    def expect(self, trainer: Trainer) -> None:
        """Let Lightning foresee the length of an epoch; it must not stop there by itself (`begin`)."""
        if self._counts and (length := self._strategy.feeding.epoch_batches()) is not None:
            trainer.fit_loop.max_batches = length if self.progress is None else float("inf")

    def begin(self, trainer: Trainer) -> None:
        """Training starts, from wherever a checkpoint left it."""
        strategy, n = self._strategy, self._strategy.world_size
        if self._counts and strategy.feeding.epoch_batches() is not None:
            trainer.fit_loop.max_batches = float("inf")
        self._written = trainer.global_step
        agenda = Agenda(self._items(trainer) if self._counts else ())
        before, epoch = self._earlier(trainer, n)
        desk, batch = strategy.office.desk(PROGRESS), strategy.feeding.batch
        in_step = strategy.algorithm.in_step
        self.progress = Progress(desk, n=n, agenda=agenda, batch=batch, in_step=in_step, before=before, epoch=epoch)
        self._shown = self.progress.steps()
        self._logged = self._shown // max(1, compat.log_every(trainer))
        self._validated = time.monotonic()
        if trainer.lightning_module.automatic_optimization:
            self._schedules.take(strategy.lr_scheduler_configs, self.progress.steps())

    def put_back(self) -> None:
        """The run is over: Lightning's counts are Lightning's again. Idempotent."""
        for name, value in self._counts.items():
            setattr(self._strategy.trainer, name, value)
        if self._val_seconds is not None:
            compat.give_val_seconds(self._strategy.trainer, self._val_seconds)
        self._schedules.give_back()
        self._counts, self._restored, self._val_seconds = {}, {}, None
        self.progress = None
        self.over = self.requeue = False

    def _items(self, trainer: Trainer) -> Iterator[Item]:
        n, feeding = self._strategy.world_size, self._strategy.feeding
        length = feeding.epoch_batches()
        if trainer.max_steps > 0:
            yield Item(Due.NOTHING, Unit.UPDATES, trainer.max_steps * n, once=True)
        for callback in compat.callbacks(trainer):
            if isinstance(callback, ModelCheckpoint) and (every := compat.saves_every(callback)):
                yield Item(Due.NOTHING, Unit.UPDATES, every * n)
        if self._meet_every is not None:
            yield Item(Due.NOTHING, Unit.SAMPLES, self._meet_every)
        yield from self._validations(trainer, length, n)
        if feeding.share is None and feeding.limit != 1.0:
            if not isinstance(feeding.limit, int):
                raise MisconfigurationException(
                    f"`limit_train_batches={feeding.limit}` is a part of an epoch whose length nobody knows; give a "
                    "number of batches"
                )
            yield Item(Due.END_EPOCH, Unit.BATCHES, feeding.limit * n, in_epoch=True)

    def _validations(self, trainer: Trainer, length: int | None, n: int) -> Iterator[Item]:
        every, in_epoch = self._val_every, trainer.check_val_every_n_epoch is not None
        if isinstance(every, float) and every < 1.0:
            if length is None:
                raise MisconfigurationException(
                    f"`val_check_interval={every}` is a part of an epoch whose length nobody knows; give a number of "
                    "batches"
                )
            every = max(1, int(length * every))
        self._at_end = self._val_seconds is None and (every == 1.0 and isinstance(every, float))
        if isinstance(every, int):
            self._at_end = in_epoch and length is not None and length % every == 0
            yield Item(
                Due.VALIDATE,
                Unit.BATCHES,
                every * n,
                in_epoch=in_epoch,
                below=length * n if length and in_epoch else None,
            )

    def _earlier(self, trainer: Trainer, n: int) -> tuple[Tally, Tally]:
        """What an earlier part of the run did, as if it had been done by so many members as there are now."""
        state = self._restored
        if not state:
            batches = trainer.fit_loop.epoch_loop.batch_progress
            before = Tally(batches.total.ready * n, trainer.global_step * n)
            return before, before.minus(Tally(batches.current.ready * n))
        return tuple(_scaled(Tally(*state[name]), n, state["n"]) for name in ("agreed", "epoch"))  # type: ignore[return-value]

    # -- the batch -----------------------------------------------------------------------------------------------------

    def batch_started(self, trainer: Trainer) -> None:
        """A batch begins; it may be the last of an epoch that only the agenda ends."""
        if self.progress is None:
            return
        self.progress.batch_started()
        if self.progress.is_last():
            trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True
        self._log_by(trainer, trainer.global_step)

    def batch_ended(self, trainer: Trainer, samples: int) -> bool:
        """Count a batch; whether this member stops here for a meeting."""
        progress = self.progress
        if progress is None:
            return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        progress.batch_ended(updates=trainer.global_step - self._written, samples=samples)
        self._write(trainer)
        progress.ended = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self._call(trainer)
        trainer.val_check_batch = NEVER if self._counts else trainer.val_check_batch
        return progress.ended or progress.is_due()

    def summon(self, trainer: Trainer) -> None:
        """This member comes to a meeting: the others must know if it does so out of turn."""
        if self.progress is not None:
            self._call(trainer)

    def conclude(self, trainer: Trainer, outcome: Outcome) -> None:
        """What a meeting agreed on, told to Lightning: counts, schedules, whether to stop."""
        progress = self.progress
        assert progress is not None  # only a member that counts comes to a meeting
        self._write(trainer)
        if (compat.log_step(trainer) + 1) % max(1, compat.log_every(trainer)):  # else this batch is logged anyway
            self._log_by(trainer, trainer.global_step - 1)
        loop = trainer.fit_loop.epoch_loop
        if outcome.due & Due.END_EPOCH and not loop.batch_progress.is_last_batch:
            loop.batch_progress.is_last_batch = True
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        if outcome.wishes & Wish.STOP:
            trainer.should_stop = True
        reached = 0 <= trainer.max_steps <= trainer.global_step
        self.over = outcome.ended or bool(outcome.due & Due.END_EPOCH) or bool(outcome.wishes & Wish.STOP) or reached
        self.validating = self._validates(trainer, outcome)
        if self.validating:
            self._validated = time.monotonic()
            iteration = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
            trainer.val_check_batch = iteration + 1

    def _validates(self, trainer: Trainer, outcome: Outcome) -> bool:
        """Whether a validation follows this meeting."""
        due = outcome.due & Due.VALIDATE or outcome.first & Wish.VALIDATE or (outcome.ended and self._at_end)
        stopped = outcome.wishes & Wish.STOP
        return bool(self._counts) and bool(due or stopped) and compat.validates_in_this_epoch(trainer)

    # -- a part of the checkpoint --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """How far the run has come."""
        progress = self.progress
        if progress is None:
            return {}
        return {"n": progress.n, "agreed": list(progress.agreed), "epoch": list(progress.epoch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Before `begin`."""
        self._restored = state

    # -- inside --------------------------------------------------------------------------------------------------------

    def _write(self, trainer: Trainer) -> None:
        """The run's steps become Lightning's; schedules, which have an end, never go by more than was told."""
        assert self.progress is not None
        self._written = self.progress.about()
        if self._counts:
            compat.set_global_step(trainer, self._written)
        else:
            self._written = trainer.global_step
        self._schedules.follow(trainer, self.progress.steps() if self._counts else self._written)

    def _log_by(self, trainer: Trainer, steps: int) -> None:
        """Each multiple of `log_every_n_steps` that the run passes is logged once, be this rank slow or fast."""
        every = compat.log_every(trainer)
        if not self._counts or every < 1:
            return
        self._shown = steps = max(steps, self._shown)
        number = (steps + 1) // every
        if number > self._logged:
            self._logged = number
            compat.set_log_step(trainer, number * every - 1)
        else:
            compat.set_log_step(trainer, steps + (every > 1 and (steps + 1) % every == 0))

    def _call(self, trainer: Trainer) -> None:
        assert self.progress is not None
        wishes = self._wishes(trainer)
        if wishes:
            self.progress.call(wishes)

    def _wishes(self, trainer: Trainer) -> Wish:
        wishes = Wish.NOTHING
        if trainer.should_stop and compat.can_stop_early(trainer):
            wishes |= Wish.STOP
        if self.requeue:
            wishes |= Wish.REQUEUE
        if self._strategy.office.flags.terminating:
            wishes |= Wish.TERMINATE
        if self._counts and self._strategy.is_global_zero:
            wishes |= self._by_time(trainer)
        return wishes

    def _by_time(self, trainer: Trainer) -> Wish:
        """The first rank's clock speaks for all."""
        wishes, now = Wish.NOTHING, time.monotonic()
        if self._val_seconds is not None and now - self._validated >= self._val_seconds:
            wishes |= Wish.VALIDATE
        for callback in compat.callbacks(trainer):
            if isinstance(callback, ModelCheckpoint) and compat.save_is_due(callback, now):
                wishes |= Wish.SAVE
            if isinstance(callback, Timer) and compat.time_is_up(callback) and not trainer.should_stop:
                wishes |= Wish.SAVE
        return wishes

    def _wants_requeue(self, *signal: object) -> None:
        self.requeue = True

    def requeued(self, trainer: Trainer) -> None:
        """Save and ask for a new place in the queue, as Lightning would have done in the signal handler."""
        self.requeue = False
        compat.requeue(trainer, self._requeue)


def _scaled(tally: Tally, n: int, before: int) -> Tally:
    """The counts that `n` members have at the same step of the run."""
    return Tally(tally.batches * n // before, tally.updates * n // before, tally.samples)


def _ask_at_meetings(leash: compat.Leash, callback: Callback, clock: Clock) -> None:
    """The callback saves, or stops, with all ranks or not at all; so all must see the same end of a batch."""
    ask = callback.on_train_batch_end

    def on_train_batch_end(trainer: Trainer, *batch: Any, **more: Any) -> None:
        if not clock.meeting():
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        last, progress.is_last_batch = progress.is_last_batch, clock.validating
        try:
            ask(trainer, *batch, **more)
        finally:
            progress.is_last_batch = last

    leash.wrap(callback, "on_train_batch_end", on_train_batch_end)


def _nowhere() -> bool:
    """Before a run there is no meeting."""
    return False
