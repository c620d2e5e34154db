"""When Lightning validates, and how one is run where its loop would not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer


def val_seconds(trainer: Trainer) -> float | None:
    """The time between validations, if that is how the Trainer was told to validate."""
    seconds: float | None = getattr(trainer, "_val_check_time_interval", None)
    return seconds


@contextmanager
def with_val_seconds(trainer: Trainer, other: float | None) -> Iterator[None]:
    """A Trainer that was told another time; None: it was not told so."""
    seconds, vars(trainer)["_val_check_time_interval"] = val_seconds(trainer), other
    try:
        yield
    finally:
        vars(trainer)["_val_check_time_interval"] = seconds


def is_time_to_validate(trainer: Trainer) -> bool:
    """Whether that time has passed since the last validation, in an epoch that has one."""
    seconds = val_seconds(trainer)
    return seconds is not None and time.monotonic() - _last(trainer) >= seconds and validates_in_this_epoch(trainer)


def _last(trainer: Trainer) -> float:
    last: float = vars(trainer)["_last_val_time"]
    return last


def validates_in_this_epoch(trainer: Trainer) -> bool:
    """Whether Lightning validates in this epoch at all."""
    return bool(trainer.fit_loop.epoch_loop._should_check_val_epoch())


def validate(trainer: Trainer) -> None:
    """Run a validation as the loop does after a batch."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    trainer.validating = True
    first = connector._first_loop_iter
    loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first
