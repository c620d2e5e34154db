"""Rank 0 alone writes checkpoints, so its names for them are the ones that exist.

A name with `{step}` differs by rank where ranks take different numbers of steps: without this, `ckpt_path="best"` would
look for files that nobody wrote.
"""

from __future__ import annotations

import json

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async.strategies.compat import callbacks, last_save, set_last_save
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds

PATHS = ("best_model_path", "last_model_path", "kth_best_model_path")


def agree_on_saved(trainer: Trainer, rounds: Rounds) -> Wait[None]:
    """Give every rank the paths of the first living rank. All say theirs: who was first may die on the way."""
    for callback in callbacks(trainer):
        if isinstance(callback, ModelCheckpoint):
            mine = {name: str(getattr(callback, name)) for name in PATHS}
            mine["last"] = last_save(callback)  # type: ignore[assignment]  # of a cut the first rank alone knows
            mine["best_k"] = {path: float(score) for path, score in callback.best_k_models.items()}  # type: ignore[assignment]
            said = yield from rounds.agree(json.dumps(mine).encode(), what="what was saved")
            theirs = json.loads(said[min(said)])
            for name in PATHS:
                setattr(callback, name, theirs[name])
            set_last_save(callback, *theirs["last"])
            callback.best_k_models = {path: torch.tensor(score) for path, score in theirs["best_k"].items()}
