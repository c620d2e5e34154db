"""The ranks of a run are alike, or none of them trains: one version, one method, the same knobs, the same end.

Whoever expects a kind of message that a neighbour never sends, or a meeting to which it never comes, waits as long as a
meeting may last. What belongs to a host alone (threads, network interfaces, folders, how much data) may differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async.strategies import compat
from lightning_async.strategies.facts import Recorded, knobs_of
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds
from lightning_async.version import __version__

OF_A_HOST = {"inner_threads", "threads"}
OF_THE_TRAINER = (
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "check_val_every_n_epoch",
    "accumulate_grad_batches",
    "reload_dataloaders_every_n_epochs",
    "precision",
)
"""What decides when ranks meet, and in what numbers they speak."""


def creed(strategy: Recorded) -> dict[str, Any]:
    """What of a strategy must be the same on every rank, the weightiest first."""
    knobs = {name: value for name, value in knobs_of(strategy).items() if name not in OF_A_HOST}
    return {"version": __version__, "strategy": strategy.name, **knobs}


def plan(trainer: Trainer, limit: int | float) -> dict[str, Any]:
    """What of a Trainer must be. `limit`: the `limit_train_batches` that the user gave."""
    seconds = compat.val_seconds(trainer)  # who validates by time has no `val_check_interval`
    savers = [callback for callback in compat.callbacks(trainer) if isinstance(callback, ModelCheckpoint)]
    return {name: getattr(trainer, name) for name in OF_THE_TRAINER} | {
        "val_check_interval": trainer.val_check_interval if seconds is None else f"{seconds} s",
        "limit_train_batches": limit,
        "every_n_train_steps": [compat.saves_every(saver) for saver in savers],
        "train_time_interval": [compat.saves_after(saver) for saver in savers],
    }


def check_alike(mine: Mapping[str, Any], rounds: Rounds) -> Wait[None]:
    """Raise on all ranks if one is unlike the others, with the first thing in which it is."""
    words = yield from rounds.agree(json.dumps(mine).encode(), what="who is alike")
    creeds = {rank: json.loads(word) for rank, word in words.items()}
    for name in dict.fromkeys(name for theirs in creeds.values() for name in theirs):
        said: dict[str, list[str]] = {}
        for rank, theirs in creeds.items():
            said.setdefault(repr(theirs.get(name)), []).append(str(rank))
        if len(said) > 1:
            who = ", ".join(f"{name}={value} on rank {', '.join(at)}" for value, at in said.items())
            raise RuntimeError(
                f"the ranks are not alike: {who}. Give all of them the same lightning_async, strategy and Trainer"
            )
