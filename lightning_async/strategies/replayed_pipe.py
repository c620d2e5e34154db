"""A stage of a recorded run, once more: the run's own strategy in a Trainer of its own, on its log.

The seed draws what it drew, batches are the recorded ones, and every tensor that a stage got is made again by its
neighbour's replay. The pipe is drained where it was drained, and replicas average their buffers where they did. Rests
else, and what was evaluated there, are left out: they change no weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import Module
from torch.utils.data import DataLoader

from lightning_async.strategies.course import Course, WrongInput
from lightning_async.strategies.delayed_pipeline import DelayedPipelineStrategy
from lightning_async.strategies.handover import Handover
from lightning_async.strategies.measuring import first_batch
from lightning_async.strategies.pipe_recording import PASSES, StageRecording
from lightning_async.strategies.pipe_turns import EVENED
from lightning_async.strategies.replayed_feeding import RecordedFeeding
from lightning_async.strategies.replayed_office import Place, ReplayedOffice
from lightning_async.strategies.replaying import Replaying
from lightning_async.strategies.rests import Rests
from lightning_async.transport.hall import Hall
from lightning_async.transport.log import Log
from lightning_async.transport.mail import Wait
from lightning_async.transport.replay import ReplayCarrier
from lightning_async.transport.world import seen_as


class ReplayingStage(Replaying, StageRecording):
    """Compares what a stage passes on, too."""

    def __init__(self, carrier: ReplayCarrier, log: Log, course: Course, hall: Hall) -> None:
        super().__init__(carrier, log, course, hall)
        self.around = partial(seen_as, carrier.me, carrier.ranks)

    def _took_numbers(self, loader: DataLoader[Any]) -> None:
        raise WrongInput(
            f"the run trained on streams, and the data set here, a {type(loader.dataset).__name__}, is none: give the "
            "run's own training data"
        )

    def clock(self, trainer: Trainer) -> None:
        """The end of an epoch, and of an update, as the log has them."""
        super().clock(trainer)
        if (batches := self._carrier.note("accumulate", None)) is not None:
            trainer.accumulate_grad_batches = batches

    def _catch_up(self, name: str) -> None:
        """Whether something else drew random numbers before it is in the log."""
        self.strayed()
        super()._catch_up(name)

    def _compare(self, name: str, now: Any, recorded: Any) -> None:
        if name not in PASSES:
            super()._compare(name, now, recorded)
        elif recorded is not None and self._course.tolerance is None:
            self._course.digests += 1
            if now != recorded:
                was, stamp = f"{recorded[1]:08x} for batch {recorded[0]}", f"{now[1]:08x} for batch {now[0]}"
                said = f"the stamp of what its {PASSES[name]} pass passed on was {was} and is {stamp} now"
                self._differ(self._log.step + 1, said)


class RecordedRests(Rests):
    """The stages drain the pipe where they did, and train as long as they trained."""

    def __init__(self, strategy: DelayedPipelineStrategy, replaying: ReplayingStage, log: Log) -> None:
        super().__init__(strategy)
        self._replaying = replaying
        self._epochs = log.number_of_epochs()
        self._last, self._trained = set(log.last_batches()), log.batches()
        self._batches = 0

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Learning rates come from the log; a scheduler may go by a metric that nobody computes here."""
        self.strategy.lr_scheduler_configs = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is trained on; perhaps the pipe was drained behind it, perhaps the epoch was over."""
        self._batches += 1
        self.strategy.batch_ended(outputs)
        trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = self._batches in self._last
        while (evened := self._replaying.mark(EVENED)) or self._replaying.meets():
            if evened:
                self.strategy.turns.average_buffers()
            else:
                self.strategy.turns.drain()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Perhaps it was the last."""
        if self._batches not in self._last and self._batches < self._trained:
            raise WrongInput(
                f"the training data of stage {self.strategy.index} end behind its batch {self._batches}, in the middle "
                "of an epoch of the run: they are others, or do not begin where they began"
            )
        self._epochs -= 1
        trainer.should_stop = self._epochs <= 0

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """The pipe is drained, if it was."""


class SeatedPipeline(DelayedPipelineStrategy):
    """The strategy, for stages of one process."""

    recorded: RecordedFeeding
    seed = 0
    streams = measures = False

    def setup_distributed(self) -> None:
        """No process group: the hall takes its place."""

    def load_checkpoint(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Lightning holds a lock meanwhile, for which the others would wait: each member reads its part alone."""
        with self._replayed.alone():
            loaded = super().load_checkpoint(*arguments, **options)
        self._stage.goes_on(loaded["loops"]["fit_loop"])
        return loaded

    def _equalise(self, module: Module) -> Wait[int]:
        """The run's seed, whatever was drawn before it."""
        yield from super()._equalise(module)
        return self.seed

    def _cuts(self, handover: Handover) -> tuple[int, ...]:
        """As in the run; where the blocks were measured, a stream has given its first batch for that."""
        if self.measures and not self._saved_cuts(len(handover.blocks)):
            with self.recording.around():
                first_batch(self)
        return super()._cuts(handover)

    def process_dataloader(self, dataloader: object) -> object:
        """The recorded batches; of a stream, what is drawn from it anew."""
        if self.streams:
            return super().process_dataloader(dataloader)
        return self.recorded.share_out(dataloader, self.office, lambda: self.trainer.current_epoch)

    def batch_ended(self, outputs: Any) -> None:
        """One of the recorded batches is trained on."""
        if self.streams:
            self._stage.batches += 1
        else:
            self.recorded.completed()
        super().batch_ended(outputs)

    def rest(self, *, drain: bool = False) -> None:
        """See `RecordedRests`: where the pipe was drained is in the log."""

    def keep_stop(self) -> None:
        """How long they trained is in the log."""

    def stop_together(self) -> None:
        """See `keep_stop`."""

    def stop_after_rest(self) -> None:
        """See `keep_stop`."""

    def on_train_end(self) -> None:
        """Nobody wants the module."""

    @property
    def _stage(self) -> Replaying:
        assert isinstance(self._replayed.recording, Replaying)  # see `seat_stage`
        return self._replayed.recording

    @property
    def _replayed(self) -> ReplayedOffice:
        assert isinstance(self.office, ReplayedOffice)  # see `seat_stage`
        return self.office


def seat_stage(
    carrier: ReplayCarrier, log: Log, course: Course, hall: Hall, place: Place
) -> tuple[SeatedPipeline, list[Callback]]:
    """A stage's strategy, cut where it was cut, and the callback that stands first among its Trainer's."""
    begin, replaying = log.first("start"), ReplayingStage(carrier, log, course, hall)
    cuts = {"split": begin["cuts"]} if begin["cuts"] else {}
    strategy = SeatedPipeline(**log.header["knobs"] | cuts, cluster_environment=place)
    strategy.office = ReplayedOffice(carrier, replaying, hall)
    lengths = {note["epoch"]: note["batches"] for note in log.notes_of("epoch") if "batches" in note}
    skipped = log.notes_of("skipped")
    strategy.recorded = RecordedFeeding(carrier, replaying, begin["mass"], lengths=lengths, skipped=skipped)
    replaying.strategy, strategy.seed = strategy, begin["seed"]
    strategy.streams = begin.get("fed") == "stream"
    strategy.measures = strategy.streams and log.header["knobs"]["split"] == "auto"
    return strategy, [RecordedRests(strategy, replaying, log)]
