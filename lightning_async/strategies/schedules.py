"""Learning rates by step go by the run's steps: after a local step none, one or several steps of the schedule.

    rank 0, fast   |-|-|-|-|-|-|-|-|        run: 0 1 1 2 3 4 4 5
    rank 1, slow   |- - -|- - -|- -         run: 1     3     5      the same learning rate at every meeting

So all ranks end where the schedule ends, and none goes past its last step.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfig

NEVER = 2**62
"""A frequency at which Lightning never steps a scheduler by itself."""


class Schedules:
    """The schedulers with `interval="step"` of one rank."""

    def __init__(self) -> None:
        self._taken: list[tuple[LRSchedulerConfig, int]] = []
        self._steps = 0

    def take(self, configs: Sequence[LRSchedulerConfig], steps: int) -> None:
        """Take them out of Lightning's hands, at this step of the run."""
        self._taken = [(config, config.frequency) for config in configs if config.interval == "step"]
        self._steps = steps
        for config, _ in self._taken:
            config.frequency = NEVER

    def give_back(self) -> None:
        """Put them back. Idempotent."""
        for config, frequency in self._taken:
            config.frequency = frequency
        self._taken = []

    def follow(self, trainer: Trainer, steps: int) -> None:
        """Step each as often as the run came past a multiple of its frequency."""
        before, self._steps = self._steps, max(self._steps, steps)
        for config, frequency in self._taken:
            for _ in range(self._steps // frequency - before // frequency):
                trainer.lightning_module.lr_scheduler_step(config.scheduler, None)
