"""Under which step something is logged, when, what was computed of it, and who goes by that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_async.strategies.compat.leash import Leash


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


@contextmanager
def metric_shown(trainer: Trainer, name: str, value: Tensor) -> Iterator[None]:
    """A metric that this rank did not log is this, for a while."""
    metrics = trainer._logger_connector._callback_metrics
    before, metrics[name] = metrics.get(name), value
    try:
        yield
    finally:
        del metrics[name]
        metrics.update({} if before is None else {name: before})


def is_of_before(trainer: Trainer, name: str) -> bool:
    """Whether training logs this metric, and has not logged it in this epoch."""
    results = trainer.fit_loop.epoch_loop._results
    logged = [r for r in results.values() if name in {r.meta.name, r.meta.forked_name(True), r.meta.forked_name(False)}]
    return bool(logged) and all(result.has_reset for result in logged)


def where_epochs_end(trainer: Trainer, leash: Leash, then: Callable[[], None]) -> None:
    """`then` is called where all is there that an epoch of training logged, before schedules look at it."""

    def epoch_end() -> None:
        original()
        if trainer.training:
            then()

    original = leash.replace("_logger_connector.on_epoch_end", epoch_end)


def plateaus_go_by(trainer: Trainer, leash: Leash, values: Mapping[str, Tensor]) -> None:
    """What a `ReduceLROnPlateau` by epoch sees of a metric is this, where it is known."""

    def look(name: str) -> Any:
        return values[name] if name in values else original(name)

    original = leash.replace("fit_loop.epoch_loop._get_monitor_value", look)
