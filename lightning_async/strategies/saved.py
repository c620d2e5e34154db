"""Rank 0 alone writes checkpoints, so its names for them are the ones that exist.

A name with `{step}` differs by rank where ranks take different numbers of steps: without this, `ckpt_path="best"` would
look for files that nobody wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async.strategies.compat import callbacks, last_save, set_last_save
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds

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
