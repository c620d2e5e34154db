"""Learning rates by step go by the run's steps: after a local step none, one or several steps of the schedule.

    rank 0, fast   |-|-|-|-|-|-|-|-|        run: 0 1 1 2 3 4 4 5
    rank 1, slow   |- - -|- - -|- -         run: 1     3     5      the same learning rate at every meeting

So all ranks end where the schedule ends, and none goes past its last step: a whole epoch counts for the steps that a
synchronous run has in it (`progress/progress.py`), and none is counted beyond them, or beyond `max_steps`.

A plateau goes by a metric, which only a meeting can agree on: `ReduceLROnPlateau` with `interval="step"` is asked as a
meeting ends, validation behind it, at most once a meeting and where the run came past a multiple of its frequency. It
sees the mean over the ranks that have the metric, so all reduce together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_async.strategies import compat
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds

NEVER = 2**62
"""A frequency at which Lightning never steps a scheduler by itself."""


class Schedules:
    """The schedulers with `interval="step"` of one rank."""

    def __init__(self) -> None:
        self._taken: list[tuple[LRSchedulerConfig, int]] = []
        self._steps = self._met = 0
        self._due: list[LRSchedulerConfig] = []

    def take(self, configs: Sequence[LRSchedulerConfig], steps: int) -> None:
        """Take them out of Lightning's hands, at this step of the run."""
        self._taken = [(config, config.frequency) for config in configs if config.interval == "step"]
        self._steps = self._met = steps
        for config, _ in self._taken:
            config.frequency = NEVER

    @property
    def steps(self) -> int:
        """The run's step that they have followed to: no more than was told by then."""
        return self._steps

    def give_back(self) -> None:
        """Put them back. Idempotent."""
        for config, frequency in self._taken:
            config.frequency = frequency
        self._taken, self._due = [], []

    def follow(self, trainer: Trainer, steps: int) -> None:
        """Step each as often as the run came past a multiple of its frequency."""
        before, self._steps = self._steps, max(self._steps, steps)
        for config, frequency in self._taken:
            for _ in range(0 if config.reduce_on_plateau else self._steps // frequency - before // frequency):
                trainer.lightning_module.lr_scheduler_step(config.scheduler, None)

    def meet(self, steps: int) -> None:
        """All met at this step: plateaus fall due."""
        before, self._met = self._met, steps
        plateaus = [(config, frequency) for config, frequency in self._taken if config.reduce_on_plateau]
        self._due = [config for config, frequency in plateaus if steps // frequency > before // frequency]

    def ask_plateaus(self, trainer: Trainer, rounds: Rounds) -> Wait[None]:
        """The meeting ends: ask those that are due, all ranks with the same number."""
        due, self._due = self._due, []
        for config in due:
            value = compat.last_metric(trainer, str(config.monitor))
            word = b"" if value is None else repr(float(value)).encode()
            words = yield from rounds.agree(word, what=f"plateau of {config.monitor!r}")
            values = [float(said) for said in words.values() if said]
            if values:
                trainer.lightning_module.lr_scheduler_step(config.scheduler, torch.tensor(sum(values) / len(values)))
            else:
                rank_zero_warn(
                    f"ReduceLROnPlateau found no metric {config.monitor!r} at a meeting and was not asked: log it in "
                    "`validation_step`, and let a validation come with every `frequency` steps"
                )
