"""Callbacks that give an optimizer new groups as an epoch starts find it as the user made it: with all parameters.

    epoch starts    the optimizer has whole groups again -> the callback thaws, and adds one -> each rank keeps its own
    a run goes on   the same where the callback puts back the groups that it knows of

So all ranks add the same group, under the same numbers, whatever lives there; and what the callback saves of it are the
groups of the user's optimizer, as in a plain run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch.optim import Optimizer

from lightning_async.strategies import compat

if TYPE_CHECKING:
    from lightning_async.strategies.pipes import Pipes

Hook = Callable[[Trainer, LightningModule], None]


def give_whole_groups(strategy: Pipes, leash: compat.Leash) -> None:
    """To all callbacks of that kind, for the time of a run."""
    for callback in compat.callbacks(strategy.trainer):
        if isinstance(callback, BaseFinetuning):
            for name in ("on_fit_start", "on_train_epoch_start"):
                leash.wrap(callback, name, partial(_with_whole_groups, strategy, getattr(callback, name)))


def _with_whole_groups(strategy: Pipes, hook: Hook, trainer: Trainer, module: LightningModule) -> None:
    with strategy.turns.parts.whole_groups(strategy.optimizers), _known_by_name():
        hook(trainer, module)


@contextmanager
def _known_by_name() -> Iterator[None]:
    """Lightning leaves out what equals a parameter that the optimizer has, number for number. What lives elsewhere has
    no numbers, and two layers that begin with zeros are two: here a parameter equals itself alone."""
    kept = vars(BaseFinetuning)["filter_on_optimizer"]
    BaseFinetuning.filter_on_optimizer = staticmethod(_not_in)  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseFinetuning.filter_on_optimizer = kept  # type: ignore[method-assign]


def _not_in(optimizer: Optimizer, params: Iterable[Any]) -> list[Any]:
    had = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [p for p in params if id(p) not in had]
