"""Where a run goes on with other ranks than those that saved, what these had not sent is shared out among the new ones.

saved by 4     rank 0   rank 1   rank 2   rank 3          each file is read by one rank alone, so the sum is kept
                 |        |        |        |
go on with 2   rank 0   rank 1   rank 0   rank 1
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_async.strategies.rank_files import main_file, rank_file
from lightning_async.strategies.resuming import KEY, another_world

if TYPE_CHECKING:
    from lightning_async.strategies.base import AsyncStrategy


def heirlooms(
    strategy: AsyncStrategy,
    path: Any,
    checkpoint: dict[str, Any],
    *,
    weights_only: bool | None,
    everything: bool = False,
) -> list[dict[str, Any]]:
    """The states of the algorithm on the old ranks that fall to this one; none where the world is the same.

    With `everything` those of all old ranks, for a method that takes from each file its own part. The files are read
    with `weights_only`, unless the user said otherwise of the main file.
    """
    shared = checkpoint.get(KEY)
    if shared is None or not another_world(strategy, shared):
        return []
    old = shared["ranks"] if everything else shared["ranks"][strategy.global_rank :: strategy.world_size]
    states = (_state(strategy, path, shared["save"], rank, weights_only is not False) for rank in old)
    return [state for state in states if state]  # of a member of several ranks, one has it


def _state(strategy: AsyncStrategy, path: Any, save: str, rank: int, weights_only: bool) -> dict[str, Any] | None:
    file = rank_file(main_file(os.fspath(path)), save, rank)
    try:
        own = strategy.checkpoint_io.load_checkpoint(file, weights_only=weights_only)
    except Exception as error:  # each CheckpointIO has its own way to say that there is no such file
        rank_zero_warn(
            f"{strategy.name}: {file} cannot be read ({type(error).__name__}: {error}); what that rank had not sent "
            "yet is lost, about one update of one rank, and of a server what the shards of that rank remembered"
        )
        return None
    state: dict[str, Any] = own["parts"]["algorithm"]
    return state
