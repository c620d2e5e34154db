"""Rank 0 alone writes checkpoints, so its names for them are the ones that exist.

A name with `{step}` differs by rank where ranks take different numbers of steps, and one with a metric where that is
logged without `sync_dist`: without this, `ckpt_path="best"` would look for files that nobody wrote. A callback seeks a
name that is free, all ranks together: where one goes on with a name of before and another does not, they would part. So
they would where one takes another file for the worst.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_async.strategies.compat import Leash, callbacks, last_save, name_files_by, score_by, set_last_save
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds

if TYPE_CHECKING:
    from lightning_async.strategies.collectives import Collectives

PATHS = ("best_model_path", "last_model_path", "kth_best_model_path")


def names_of(callback: ModelCheckpoint) -> dict[str, Any]:
    """What this rank calls the files of a callback, and when it saved last: of a cut the first rank alone is asked."""
    best_k = {path: float(score) for path, score in callback.best_k_models.items()}
    return {**{name: str(getattr(callback, name)) for name in PATHS}, "best_k": best_k, "last": [*last_save(callback)]}


def take_names(callback: ModelCheckpoint, names: Mapping[str, Any]) -> None:
    """They are called so."""
    for name in PATHS:
        setattr(callback, name, names[name])
    set_last_save(callback, *names["last"])
    callback.best_k_models = {path: torch.tensor(score) for path, score in names["best_k"].items()}


def agree_on_saved(trainer: Trainer, rounds: Rounds) -> Wait[None]:
    """Give every rank the paths of the first living rank. All say theirs: who was first may die on the way."""
    for callback in callbacks(trainer):
        if isinstance(callback, ModelCheckpoint):
            said = yield from rounds.agree(json.dumps(names_of(callback)).encode(), what="what was saved")
            take_names(callback, json.loads(said[min(said)]))


def name_alike(trainer: Trainer, leash: Leash, strategy: Collectives) -> None:
    """At meetings files are called as by the first living rank, from the moment on when a callback makes up a name; and
    the best are those that are best there."""
    for callback in callbacks(trainer):
        if isinstance(callback, ModelCheckpoint):
            score_by(callback, leash, partial(_score_of_all, strategy))
            name_files_by(callback, leash, partial(_name_of_all, strategy, callback.format_checkpoint_name))


def _name_of_all(strategy: Collectives, make: Callable[..., str], *arguments: Any, **more: Any) -> str:
    mine = make(*arguments, **more)
    if not strategy.meeting:
        return mine
    said = strategy.together(strategy.office.rounds.agree(os.fsencode(mine), what="what to call a checkpoint"))
    return os.fsdecode(said[min(said)])


def _score_of_all(strategy: Collectives, mine: Tensor | None) -> Tensor | None:
    if not strategy.meeting:
        return mine
    word = json.dumps(None if mine is None else float(mine)).encode()
    said = strategy.together(strategy.office.rounds.agree(word, what="the score of a checkpoint"))
    score = json.loads(said[min(said)])
    if score is None:
        return None
    return torch.tensor(score) if mine is None else torch.full_like(mine, score)
