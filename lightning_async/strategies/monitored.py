"""What callbacks and schedules go by is there on all ranks where one has it: the others would raise, or pass it over.

    logged on all      each has its own, the same with `sync_dist=True`
    logged on some     who had no batch in this epoch, or is not the one that logs (`rank_zero_only`), takes that of the
                       first living rank that has it: in the place of one of an earlier epoch, too
    logged on none     Lightning's own behaviour, on all alike

All tell each other where one is about to look, and only there: where a `ModelCheckpoint` or an `EarlyStopping` that
goes by a metric is asked, and at the step of a `ReduceLROnPlateau` by epoch. That one sees the mean over the ranks that
have it, as one by step does, so that all learning rates stay equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_async.strategies import compat

if TYPE_CHECKING:
    from lightning_async.strategies.collectives import Collectives


def let_all_see(trainer: Trainer, leash: compat.Leash, strategy: Collectives) -> None:
    """At meetings, for the time of a run."""
    for callback in compat.callbacks(trainer):
        if isinstance(callback, (ModelCheckpoint, EarlyStopping)) and callback.monitor is not None:
            compat.looks_within(callback, leash, partial(_shown, trainer, callback.monitor, strategy))
    means: dict[str, Tensor] = {}

    def look() -> None:
        means.clear()
        for name in dict.fromkeys(_plateaus(trainer)):
            if values := _said(trainer, name, strategy):
                means[name] = mean(list(values.values()))

    compat.where_epochs_end(trainer, leash, look)
    compat.plateaus_go_by(trainer, leash, means)


def mean(values: list[float]) -> Tensor:
    """Of what all ranks say; to the bit that, where all say the same."""
    found = values[0] if len({*values}) == 1 else sum(values) / len(values)
    return torch.tensor(found, dtype=torch.float64)


def _plateaus(trainer: Trainer) -> list[str]:
    """What schedules by epoch go by; those of manual optimization step by hand."""
    configs = trainer.lr_scheduler_configs if trainer.lightning_module.automatic_optimization else []
    return [str(c.monitor) for c in configs if c.reduce_on_plateau and c.interval == "epoch"]


@contextmanager
def _shown(trainer: Trainer, name: str, strategy: Collectives) -> Iterator[None]:
    """This rank sees the metric that the others have, if it has none of its own."""
    values = _said(trainer, name, strategy)
    if not values or strategy.global_rank in values:
        yield
        return
    with compat.metric_shown(trainer, name, torch.tensor(values[min(values)], dtype=torch.float64)):
        yield


def _said(trainer: Trainer, name: str, strategy: Collectives) -> dict[int, float]:
    """A metric by rank, the same on all: of those that logged it in this epoch, if there are any."""
    if not strategy.meeting or compat.fast_dev_run(trainer):  # a trial run's counts are each rank's own
        return {}
    mine = trainer.callback_metrics.get(name)
    fresh = mine is not None and not compat.is_of_before(trainer, name)
    word = json.dumps([None if mine is None else float(mine), fresh]).encode()
    words = strategy.together(strategy.office.rounds.agree(word, what=f"what {name!r} is"))
    said = {rank: json.loads(word) for rank, word in words.items()}
    values = {rank: value for rank, (value, fresh) in said.items() if fresh}
    return values or {rank: value for rank, (value, _) in said.items() if value is not None}
