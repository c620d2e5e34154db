"""Under which step something is logged, when, and what was computed of it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor


def log_step(trainer: Trainer) -> int:
    """The step under which loggers get what is logged."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_log_step(trainer: Trainer, step: int) -> None:
    """Log under this step from here on."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def count_log_step(fit: dict[str, Any]) -> None:
    """Of a saved loop over epochs: its last batch stepped, which Lightning notes behind the hooks of the batch."""
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def logs_now(trainer: Trainer) -> bool:
    """Whether Lightning logs the batch under way."""
    return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()


def log(trainer: Trainer, metrics: dict[str, float], step: int) -> None:
    """Give the loggers numbers under this step."""
    trainer._logger_connector.log_metrics(metrics, step)  # type: ignore[arg-type]


def last_metric(trainer: Trainer, name: str) -> Tensor | None:
    """A metric as it was computed last. (To read `callback_metrics` would compute some, and so wait for all ranks.)"""
    found: Tensor | None = trainer._logger_connector._callback_metrics.get(name)
    return found
