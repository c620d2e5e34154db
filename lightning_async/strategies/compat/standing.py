"""Where Lightning's loops stand, in steps, batches and epochs, and what goes by that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import Strategy


def set_global_step(trainer: Trainer, steps: int) -> None:
    """Make `trainer.global_step` this number."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:
        progress = loop.automatic_optimization.optim_progress.optimizer.step.total
    else:
        progress = loop.manual_optimization.optim_step_progress.total
    progress.ready = progress.completed = steps


def ends_in_step(trainer: Trainer) -> bool:
    """Whether an optimizer step is due with this batch, as far as `accumulate_grad_batches` goes."""
    return not trainer.fit_loop._should_accumulate()


def can_stop_early(trainer: Trainer) -> bool:
    """Whether `min_epochs` and `min_steps` are done."""
    return bool(trainer.fit_loop._can_stop_early)


def is_in_mid_epoch(trainer: Trainer) -> bool:
    """Whether a fit goes on in the middle of an epoch that a checkpoint had begun."""
    loop = trainer.fit_loop
    current: Any = loop.epoch_progress.current
    return bool(loop.restarting and not current.ready == current.started == current.processed)


def tell_epoch(trainer: Trainer, fit: dict[str, Any]) -> None:
    """The epoch that a checkpoint goes on with, before the loops are restored: the Trainer may make its loaders earlier
    (`estimated_stepping_batches`)."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    epoch.completed = epoch.processed = fit["epoch_progress"]["current"]["processed"]


def let_plateaus_step(trainer: Trainer) -> None:
    """At the end of an epoch that was gone on with, Lightning would leave them out: it may lack what they go by."""
    plateaus = [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    if all(config.monitor in trainer.callback_metrics for config in plateaus):
        trainer.fit_loop._restarting = False


@contextmanager
def within_batch(trainer: Trainer) -> Iterator[None]:
    """The last batch is not counted as completed yet, as in the hooks at its end."""
    batches = trainer.fit_loop.epoch_loop.batch_progress
    for count in (batches.current, batches.total):
        count.completed -= 1
    try:
        yield
    finally:
        for count in (batches.current, batches.total):
            count.completed += 1


@contextmanager
def within_epoch(trainer: Trainer) -> Iterator[None]:
    """Whoever is at the end of its epoch stands where the others are: behind a batch.

    Metrics that are read now are those of steps, since those of the epoch would be combined over ranks still in it; and
    what is saved now is resumed in mid-epoch, as on the others.
    """
    connector, epochs = trainer._logger_connector, trainer.fit_loop.epoch_progress
    counts: list[Any] = [epochs.current, epochs.total]
    first, connector._first_loop_iter = connector._first_loop_iter, False
    for count in counts:
        count.processed -= 1
    yield  # who leaves by an exception stays there: what is saved of that is resumed with the others
    for count in counts:
        count.processed += 1
    connector._first_loop_iter = first


@contextmanager
def behind_epoch(trainer: Trainer) -> Iterator[None]:
    """The epoch is not counted as completed yet, as in the hooks at its end: what is saved there goes on with the next
    one."""
    epochs = trainer.fit_loop.epoch_progress
    for count in (epochs.current, epochs.total):
        count.completed -= 1
    try:
        yield
    finally:
        for count in (epochs.current, epochs.total):
            count.completed += 1


def lightnings(strategy: Strategy) -> list[LightningOptimizer]:
    """The optimizers as the module gets them of `self.optimizers()`: objects of their own, that pass on what they are
    asked."""
    return strategy._lightning_optimizers
