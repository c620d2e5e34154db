"""All ranks know the checkpoints by the names of the first that lives, whoever dies as they tell each other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async.strategies.compat import last_save, set_last_save
from lightning_async.strategies.saved import agree_on_saved
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster


def _saved_by(rank: int) -> ModelCheckpoint:
    callback = ModelCheckpoint()
    callback.best_model_path, callback.best_k_models = f"{rank}.ckpt", {f"{rank}.ckpt": torch.tensor(0.5)}
    set_last_save(callback, rank + 7, f"{rank}.ckpt")
    return callback


def _agree(n: int, dead: int | None = None) -> list[ModelCheckpoint]:
    cluster, saved = VirtualCluster(n), [_saved_by(r) for r in range(n)]

    def tell(rank: int) -> Wait[Any]:
        trainer: Any = SimpleNamespace(callbacks=[saved[rank]])
        return agree_on_saved(trainer, Rounds(cluster.carriers[rank]))

    if dead is not None:
        cluster.kill(dead)
    cluster.run({rank: tell(rank) for rank in range(n)})
    return saved


def test_the_first_ranks_names_are_everybodys() -> None:
    assert {c.best_model_path for c in _agree(3)} == {"0.ckpt"}
    assert {last_save(c) for c in _agree(3)} == {(7, "0.ckpt")}


def test_where_the_first_dies_the_next_ones_names_are() -> None:
    _, *living = _agree(3, dead=0)
    assert {c.best_model_path for c in living} == {"1.ckpt"}
    assert all(c.best_k_models == {"1.ckpt": torch.tensor(0.5)} for c in living)
