"""Under a synchronous strategy all ranks have the same step time; this tells whose work it was, and who only waited.

    |-- data, hooks --|-- forward, backward, optimizer ------------------|        wall clock
                      |-- computing --|.. waiting for the others ..|-----|        this thread's processor time
    own work of a step = wall clock of the first part + processor time of the second

While a CPU rank waits in a collective its thread sleeps, so its processor time stands still. On a GPU the thread that
calls does not wait where the device does: there only the step time is known.
"""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Trainer

from lightning_async.data.counts import samples_in
from lightning_async.progress.stretch import Stretch
from lightning_async.progress.tally import ZERO, Tally


class Stopwatch:
    """Times the steps of one rank, without a word to the others.

    Attributes:
        splits: Whether a step can be told apart into work and waiting here. If not, all of it counts as work.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.splits = trainer.strategy.root_device.type == "cpu"
        self._original = trainer.strategy.training_step
        self._start = self._last = self._step_began = time.perf_counter()
        self._step_computed = self._seconds = self._own = 0.0
        self._trained, self._updates = ZERO, trainer.global_step
        vars(trainer.strategy)["training_step"] = self._training_step

    def remove(self) -> None:
        """Leave the strategy as it was. Idempotent."""
        vars(self._trainer.strategy).pop("training_step", None)

    def go_on(self) -> None:
        """An epoch begins, or a validation is over: what came before is nobody's step."""
        self._last = time.perf_counter()

    def batch_ended(self, batch: Any) -> None:
        """A step is over."""
        now = time.perf_counter()
        own = self._step_began - self._last + time.thread_time() - self._step_computed
        self._seconds += now - self._last
        self._own += own if self.splits else now - self._last
        self._last = now
        self._trained = self._trained.plus(Tally(1, 0, samples_in(batch) or 0))

    def stretch(self) -> Stretch:
        """What was done since the last call."""
        updates = self._trainer.global_step - self._updates
        trained = self._trained.plus(Tally(0, updates, 0))
        until = time.perf_counter() - self._start
        found = Stretch(trained, self._seconds, waited=max(0.0, self._seconds - self._own), until=until)
        self._reset()
        return found

    def _training_step(self, *arguments: Any, **options: Any) -> Any:
        self._step_began, self._step_computed = time.perf_counter(), time.thread_time()
        return self._original(*arguments, **options)

    def _reset(self) -> None:
        self._seconds = self._own = 0.0
        self._trained, self._updates = ZERO, self._trainer.global_step
