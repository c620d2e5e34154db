"""Lightning's counts are the run's: a step is a batch of every member, wherever each of them is by itself.

Trainer's arguments --counts--> agenda --appointments--> MEETING --outcome--> Lightning's own loop does what is due
stops, signals, times --wishes---------------------------^
                                progress --each batch--> global_step, the loggers' step, schedulers by step
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from lightning_async.progress.agenda import Agenda, Due
from lightning_async.progress.member import progress_of
from lightning_async.progress.progress import Outcome, Progress
from lightning_async.progress.report import Wish
from lightning_async.strategies import compat
from lightning_async.strategies.asking import ask_at_meetings
from lightning_async.strategies.closing import Closing
from lightning_async.strategies.counts import NEVER, Counts
from lightning_async.strategies.earlier import Earlier
from lightning_async.strategies.last_batch import LastBatch
from lightning_async.strategies.log_steps import LogSteps
from lightning_async.strategies.logbook import Logbook
from lightning_async.strategies.monitored import let_all_see
from lightning_async.strategies.schedules import Schedules
from lightning_async.strategies.wishes import Wishes
from lightning_async.transport.mail import Wait

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy

PROGRESS = 1
"""The page of a member's note that is the progress's."""


class Clock:
    """The run's progress, in Lightning's words.

    Args:
        strategy: Whose.
        meet_every: Samples of all members between two meetings; None: only where something else asks for one.

    Attributes:
        progress: How far all are; None outside of a run.
        ended: Whether the epoch ended for all at the last meeting.
        over: Whether it did, or the run.
        validating: Whether a validation follows the last meeting.
        empty: The ranks that had not trained in the epoch when all met last.
        waited: Whether this rank had nothing more to train on in its epoch, and others had, when the run was saved.
        closing: How a meeting ends: whether all stop there.
    """

    def __init__(self, strategy: AsyncStrategy, meet_every: int | None) -> None:
        self.progress: Progress | None = None
        self.ended = self.over = self.validating = self.waited = False
        self.empty: tuple[int, ...] = ()
        self._strategy = strategy
        self._counts, self._wishes = Counts(meet_every), Wishes(strategy)
        self.closing = Closing(strategy, self._wishes)
        self._schedules, self._log_steps, self._logbook = Schedules(), LogSteps(), Logbook()
        self._earlier, self._last = Earlier(), LastBatch(strategy, self._counts)
        self._written = 0
        self._partly = False  # whether the epoch under way was begun by a run with other steps
        self._stretch = (0, 0)  # the run's steps at the last two meetings

    # -- set-up -------------------------------------------------------------------------------------------------------

    def take(self, trainer: Trainer) -> None:
        """Take over the counts that Lightning would read as one rank's. Before the loaders are made."""
        self._counts.take(trainer, self._strategy.feeding)
        self._counts.by_cut = self._strategy.cuts.saves

    def hold(self, trainer: Trainer, leash: compat.Leash, meeting: Callable[[], bool]) -> None:
        """Keep callbacks from acting by one rank's count or clock: between meetings they are not asked."""

        def then_expect() -> None:
            reloads = compat.reloads(trainer)
            anew = self.progress is not None and reloads
            if reloads:
                self._strategy.feeding.replace()
            with self._counts.unread(trainer):
                setup_data()
            self.expect(trainer)
            if anew:
                self._renew(trainer)
            if self.fetches_late:
                compat.fetch_late(trainer)
            self._wishes.keep_stop(trainer)  # of a hook before the training; alone it would skip all of it

        def keep_wishes(fetcher: Any) -> None:
            run_start(fetcher)
            self._wishes.keep_stop(trainer)

        def batch_over(fetcher: Any) -> None:
            self.closing.before_validation(trainer)
            advance_end(fetcher)  # a validation, if one is due or all stop
            self.closing.after_validation(trainer)

        def epoch_over() -> None:
            epoch_end()
            self.closing.after_epoch(trainer)

        def is_due(fetcher: Any) -> Any:
            with self._counts.unread(trainer):
                return validates(fetcher)

        def by_epoch(interval: str, update_plateau_schedulers: bool) -> None:
            if not (self._last.foretold and interval == "epoch"):
                update_schedulers(interval, update_plateau_schedulers=update_plateau_schedulers)

        update_schedulers = leash.wrap(trainer.fit_loop.epoch_loop, "update_lr_schedulers", by_epoch)
        setup_data = leash.wrap(trainer.fit_loop, "setup_data", then_expect)
        validates = leash.replace("fit_loop.epoch_loop._should_check_val_fx", is_due)
        run_start = leash.wrap(trainer.fit_loop.epoch_loop, "on_run_start", keep_wishes)
        advance_end = leash.wrap(trainer.fit_loop.epoch_loop, "on_advance_end", batch_over)
        epoch_end = leash.wrap(trainer.fit_loop, "on_advance_end", epoch_over)
        leash.replace("fit_loop._iteration_based_training", lambda: False)
        let_all_see(trainer, leash, self._strategy)
        self._requeue = leash.replace("_signal_connector._slurm_sigusr_handler_fn", self._wishes.requeue.hear)
        for callback in compat.callbacks(trainer):
            if isinstance(callback, (ModelCheckpoint, Timer)):
                ask_at_meetings(
                    leash, callback, meeting, lambda: self.validating, self._passed, self._strategy.cuts.between
                )

    def expect(self, trainer: Trainer) -> None:
        """Let Lightning foresee the length of an epoch; it must not stop there by itself (`begin`)."""
        length = self._strategy.feeding.foreseen(trainer.accumulate_grad_batches)
        if self._counts.taken and length is not None:
            length = int(self._strategy.office.recording.told("length", length))
            trainer.fit_loop.max_batches = length if self.progress is None else float("inf")

    def limit(self, trainer: Trainer) -> int | float:
        """The `limit_train_batches` that the user gave."""
        return self._counts.limit(trainer)

    @property
    def fetches_late(self) -> bool:
        """Whether a batch of a stream is fetched only when it is known that the epoch has one more (`compat`)."""
        return self._last.fetches_late

    def _renew(self, trainer: Trainer) -> None:
        """The loaders are others, perhaps of another length; all are between two epochs."""
        progress, feeding = self.progress, self._strategy.feeding
        if progress is not None and (feeding.share is None or feeding.epoch_batches() is not None):
            batches = self._batches_of_all(progress.n)
            progress.renew(self._counts.items(trainer, feeding, progress.n, batches))

    def begin(self, trainer: Trainer) -> None:
        """Training starts, from wherever a checkpoint left it."""
        strategy, members = self._strategy, self._strategy.members
        feeding, in_step = strategy.feeding, strategy.algorithm.in_step
        n = feeding.step_of(members)
        if self._counts.taken and feeding.epoch_batches() is not None:
            trainer.fit_loop.max_batches = float("inf")
        self._written = trainer.global_step
        self.waited = self._earlier.waited
        if self.waited and feeding.share is not None:  # what was left of the epoch is shared out anew
            self.waited = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = False
        agenda = Agenda(self._counts.items(trainer, feeding, n, self._batches_of_all(n)))
        sums = self._earlier.sums(trainer, n, members)
        self._partly = sums.before != sums.epoch and not self._earlier.was_alike(n, self._steps_of(trainer))
        office, desk = strategy.office, strategy.office.desk(PROGRESS)
        make = progress_of(office.siblings, office.ranks_of_members, office.drive)
        weighed: dict[str, int] = {"n": n, "batch": feeding.batch, "weight": feeding.weight}
        self.progress = make(desk, agenda=agenda, in_step=in_step, **weighed, **sums._asdict())
        self._stretch = (self.progress.steps(), self.progress.steps())
        self._log_steps.begin(trainer, self.progress.steps())
        self._logbook.begin(self.progress)
        self._wishes.validated()
        if trainer.lightning_module.automatic_optimization:
            self._schedules.take(strategy.lr_scheduler_configs, self._earlier.scheduled(self.progress.steps()))
            self._schedules.follow(trainer, self.progress.steps())

    def _batches_of_all(self, n: int) -> int | None:
        """The batches of an epoch of all members, weighed; None while nobody knows, or one does not. A step weighs `n`.

        Streams may be of unlike lengths, and all members must name the same points: where those go by the length of an
        epoch they tell each other. A limit in batches is of all of them together.
        """
        feeding = self._strategy.feeding
        mine = feeding.epoch_batches()
        if not self._counts.go_by_length(feeding):
            return None if mine is None else mine * n
        limit = feeding.limit * n if isinstance(feeding.limit, int) else None
        mine = mine if limit is None else feeding.length()
        word = b"" if mine is None else str(mine).encode()
        said = self._strategy.together(self._strategy.office.rounds.agree(word, what="how long their streams are"))
        self._counts.check_alike(feeding, said)
        known = [sum(int(word) * feeding.weight_of(rank) for rank, word in said.items())] if all(said.values()) else []
        return min([*known, *([] if limit is None else [limit])], default=None)

    def put_back(self) -> None:
        """The run is over: Lightning's counts are Lightning's again. Idempotent."""
        self._counts.put_back(lambda: self._strategy.trainer)
        self._schedules.give_back()
        self._earlier.close(self.progress)
        self.progress, self.empty = None, ()
        self.ended = self.over = self._wishes.stop = False
        self._last.forget()
        self._wishes.requeue.forget()
        self.closing.forget()

    # -- the batch -----------------------------------------------------------------------------------------------------

    def batch_started(self, trainer: Trainer) -> None:
        """A batch begins; it may be the last of an epoch that only the agenda ends, unless a stream ended before."""
        if self.progress is None:
            return
        self.progress.length = self._steps_of_epoch(trainer)
        self.progress.batch_started()
        self._last.started(trainer, by_agenda=self.progress.is_last())
        if self._counts.taken:
            self._log_steps.follow(trainer, trainer.global_step)

    def batch_ended(self, trainer: Trainer, samples: int) -> bool:
        """Count a batch; whether this member stops here for a meeting."""
        progress = self.progress
        if progress is None:
            return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        progress.batch_ended(updates=trainer.global_step - self._written, samples=samples)
        self._write(trainer)
        progress.ended = self._last.ended(trainer)
        self.summon(trainer)
        trainer.val_check_batch = NEVER if self._counts.taken else trainer.val_check_batch
        meets = progress.ended or self._strategy.together(progress.comes())
        if not meets:
            self._logbook.stepped(trainer, progress)
        return meets

    def heed(self) -> None:
        """To be called by who waits inside of a step."""
        if self.progress is not None:
            self.progress.heed()

    def summon(self, trainer: Trainer) -> None:
        """Call a meeting if this member wishes for something: after each batch, and all the time that it waits for
        the others."""
        if self.progress is None:
            return
        wishes = self._wishes.now(trainer, counts=self._counts.taken, val_seconds=self._counts.val_seconds)
        if wishes:
            self.progress.call(wishes)

    def set_out(self, trainer: Trainer, roll_call: Callable[[], Outcome]) -> None:
        """All are here before the first batch: what told one of them to stop by now stops all."""
        assert self.progress is not None  # behind `begin`
        self._wishes.keep_stop(trainer)
        if roll_call().wishes & Wish.STOP:
            trainer.should_stop, self._wishes.stop = True, False

    def conclude(self, trainer: Trainer, outcome: Outcome) -> None:
        """What a meeting agreed on, told to Lightning: counts, schedules, whether to stop."""
        assert self.progress is not None  # behind `begin`
        self._write(trainer)
        self._stretch = (self._stretch[1], trainer.global_step)
        if self._counts.taken and not self._log_steps.is_logged(trainer):
            self._log_steps.follow(trainer, trainer.global_step - 1)
        self._logbook.met(trainer, self.progress)
        loop = trainer.fit_loop.epoch_loop
        if self._last.met(trainer, by_agenda=bool(outcome.due & Due.END_EPOCH)):
            self.progress.ended = True
        if outcome.wishes & Wish.STOP:
            trainer.should_stop, self._wishes.stop = True, False
        self.empty = outcome.empty
        self._partly = self._partly and not outcome.ended
        stops = bool(outcome.wishes & Wish.STOP) and compat.can_stop_early(trainer)
        reached = 0 <= trainer.max_steps <= trainer.global_step
        self.ended, self.over = outcome.ended, outcome.ended or stops or reached
        self._schedules.meet(trainer.global_step)
        self.validating = self._validates(trainer, outcome, stops=stops)
        self.closing.begin(stops=stops, over=self.over, validating=self.validating)
        if self.validating:
            self._wishes.validated()
            iteration = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
            trainer.val_check_batch = iteration + 1

    def _validates(self, trainer: Trainer, outcome: Outcome, *, stops: bool) -> bool:
        """Whether a validation follows this meeting."""
        due = outcome.due & Due.VALIDATE or outcome.first & Wish.VALIDATE or (outcome.ended and self._counts.at_end)
        return self._counts.taken and bool(due or stops) and compat.validates_in_this_epoch(trainer)

    def leave(self, trainer: Trainer) -> Wait[None]:
        """A meeting ends, with its validation behind it."""
        yield from self._schedules.ask_plateaus(trainer, self._strategy.office.rounds)

    def ran_dry(self, trainer: Trainer) -> None:
        """The epoch is over on this rank; a stream that has less than its length says so by ending, and not before."""
        self._last.ran_dry(trainer)

    def came_empty(self, trainer: Trainer) -> None:
        """The epoch is over on this rank, which had no batch in it."""
        self._last.came_empty(trainer)

    def requeued(self, trainer: Trainer) -> None:
        """Save and ask for a new place in the queue, as Lightning would have done in the signal handler."""
        self._wishes.requeue.answer()
        if self.progress is not None:
            self.progress.wishes &= ~Wish.REQUEUE  # said or not: it is done
        compat.requeue(trainer, self._requeue)

    @property
    def broke_off(self) -> bool:
        """Whether the run stopped at the last meeting, and its epoch was not over."""
        progress = self.progress
        return progress is not None and not self.ended and progress.agreed != progress.before

    # -- a part of the checkpoint --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """How far the run has come."""
        progress = self.progress
        if progress is None:
            return {}
        counts = {name: list(getattr(progress, name)) for name in ("agreed", "epoch")}
        more = {"evened": progress.evened, "steps_of": self._steps_of(self._strategy.trainer)}
        more |= {"taken": progress.taken, "members": self._strategy.members}
        return {"n": progress.n, "ended": progress.ended, **counts, **more}

    def state_at(self, words: Mapping[int, bytes]) -> tuple[dict[str, Any], int]:
        """The same where all members said this of themselves, between two meetings; and at which step of the run."""
        assert self.progress is not None  # only a member that counts has words
        agreed, taken, steps = self.progress.at(words)
        return {**self.state_dict(), "agreed": list(agreed), "taken": taken, "ended": False}, steps

    @property
    def scheduled(self) -> int:
        """The run's step to which the schedules by step have come on this rank."""
        return self._schedules.steps

    @property
    def met_at(self) -> int:
        """The run's step at the last meeting."""
        return self._stretch[1]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Before `begin`."""
        self._earlier.load(state)

    def loaded(self) -> None:
        """Lightning's counts are those of a checkpoint."""
        self._earlier.loaded()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _passed(self, every: int) -> bool:
        """Whether the run came to a multiple of so many steps, or past it, with the last meeting."""
        before, now = self._stretch
        before = max(before, self._strategy.cuts.saved_at)
        return before // every < now // every

    def whole_epoch(self, trainer: Trainer) -> int:
        """How many steps of the run the epoch counts for, now that nothing of it is left for this rank; else 0."""
        feeding = self._strategy.feeding
        return self._steps_of_epoch(trainer) if feeding.share is None or feeding.dry else 0

    def _steps_of_epoch(self, trainer: Trainer) -> int:
        """How many steps a synchronous run has in this epoch; 0 where that is not known, or not what is counted."""
        batches, accumulated = self._steps_of(trainer)
        counts = self._counts.taken and trainer.lightning_module.automatic_optimization and not self._partly
        return math.ceil(batches / accumulated) if counts else 0

    def _steps_of(self, trainer: Trainer) -> list[int]:
        """The batches of an epoch that all ranks agree on, or 0; and how many of them are a step."""
        feeding = self._strategy.feeding
        batches: int | float | None = feeding.limit
        if feeding.share is not None or 0 < feeding.limit < 1:  # a part is of streams of equal length
            batches = feeding.epoch_batches()
        elif isinstance(batches, float):  # a rank's own stream has its own length
            batches = None
        return [batches or 0, trainer.accumulate_grad_batches]

    def _write(self, trainer: Trainer) -> None:
        """The run's steps become Lightning's; schedules, which have an end, go by no more than was told, nor past it.

        Between meetings the steps are foreseen, and never fewer than before. A meeting knows them exactly: where it was
        called out of turn it may find a few less.
        """
        assert self.progress is not None  # only a member that counts writes
        if self._counts.taken:
            foreseen = self.progress.about()
            compat.set_global_step(trainer, foreseen if self._strategy.meeting else max(foreseen, self._written))
        self._written = trainer.global_step
        steps = self.progress.steps() if self._counts.taken else self._written
        self._schedules.follow(trainer, min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps)
