"""Loggers get a multiple of `log_every_n_steps` that the run passes once, and of several passed at once the last.

    run, seen from a slow rank     3    7    12   17        every=10: this rank logs at its batch that passes 10, as 9
    run, seen from a fast one      3 4 5 6 7 8 9 9 10       ... and does not log 9 a second time

Lightning logs where the step it keeps for its loggers, plus one, is a multiple: so that step is set before each batch.
"""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_async.strategies import compat


class LogSteps:
    """The loggers' step on one rank."""

    def __init__(self) -> None:
        self._logged = self._shown = 0

    def begin(self, trainer: Trainer, steps: int) -> None:
        """The run goes on from here: what lies before was logged."""
        self._shown = steps
        self._logged = steps // max(1, compat.log_every(trainer))

    def is_logged(self, trainer: Trainer) -> bool:
        """Whether Lightning logs the batch under way."""
        return (compat.log_step(trainer) + 1) % max(1, compat.log_every(trainer)) == 0

    def follow(self, trainer: Trainer, steps: int) -> None:
        """The run is so far: show the loggers a multiple that was passed, or else a step at which they do not log."""
        every = compat.log_every(trainer)
        if every < 1:
            return
        self._shown = steps = max(steps, self._shown)
        number = (steps + 1) // every
        if number > self._logged:
            self._logged = number
            compat.set_log_step(trainer, number * every - 1)
        else:
            compat.set_log_step(trainer, steps + (every > 1 and (steps + 1) % every == 0))
