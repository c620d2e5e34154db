"""The epoch that a checkpoint was written in goes on where it was left, with any number of members.

    run 1, four members    ## ### # #            each tells what it has done; the union goes into the checkpoint
    run 2, two members       #   # # ########    the others, once; each tells the union and what it has done since

What several members tell twice counts once, so a list of all they tell can be united as it is. What a batch is on its
way for, in a worker or prefetched, is not done. What a member that died did in that epoch nobody can tell: a run that
goes on from there trains on it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from lightning_async.data.order import Order
from lightning_async.data.ranges import Range, united
from lightning_async.data.share import Share

State = dict[str, Any]
"""`epoch`; `done`: its ranges of positions, an int64 tensor of (first, amount); `total`, `digest`: of its order."""


class Interrupted:
    """What earlier runs have done of the epoch that a checkpoint was written in.

    Args:
        warn: Says what the user should know.
    """

    def __init__(self, warn: Callable[[str], object]) -> None:
        self._warn = warn
        self._loaded: Mapping[str, Any] | None = None
        self._epoch, self._done = -1, list[Range]()
        self._order = (0, 0)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from here with the next epoch that is begun."""
        self._loaded = state

    def begin(self, order: Order, left: Callable[[int, Sequence[Range]], int]) -> list[Range]:
        """What is done of the order's epoch, which is about to begin.

        The first epoch after a checkpoint is the one that it was written in, or the next if nothing is left of that:
        Lightning may ask for the first iterator before it knows its epoch (`estimated_stepping_batches`), or while it
        still counts a finished epoch as open, and goes on with that same iterator.

        Args:
            order: The order; turned to the epoch that really begins.
            left: How many samples are left of so many positions without those that are done.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is not None and order.epoch <= loaded["epoch"]:
            order.set_epoch(loaded["epoch"])
            self._epoch, self._done = order.epoch, self._checked(loaded, order)
            if not left(len(order), self._done):
                order.set_epoch(order.epoch + 1)
        self._order = len(order), order.digest
        return self._done if order.epoch == self._epoch else []

    def state(self, share: Share) -> State:
        """What is done of the share's epoch, as far as this member knows, and what need not be."""
        done = [*(self._done if share.epoch == self._epoch else []), *share.done(), *share.left_out()]
        total, digest = self._order
        return {"epoch": share.epoch, "done": as_tensor(united(done)), "total": total, "digest": digest}

    def _checked(self, loaded: Mapping[str, Any], order: Order) -> list[Range]:
        mine = {"total": len(order), "digest": order.digest}
        if any(loaded.get(name, value) != value for name, value in mine.items()):
            self._warn(
                f"epoch {order.epoch} begins anew: its order is not the one of the checkpoint (other data, another "
                "sampler or another seed), so what was trained on then is not known"
            )
            return []
        return as_ranges(loaded["done"])


def unite(states: Iterable[Mapping[str, Any]]) -> State:
    """One state from those of all members of a run; one of another epoch than the newest says nothing."""
    states = list(states)
    newest = max(states, key=lambda state: int(state["epoch"]))
    parts = [state["done"] for state in states if state["epoch"] == newest["epoch"]]
    return {**newest, "done": as_tensor(united(as_ranges(torch.cat(parts))))}


def as_tensor(ranges: Sequence[Range]) -> torch.Tensor:
    """Ranges as they lie in a checkpoint."""
    return torch.tensor(ranges, dtype=torch.int64).reshape(-1, 2)


def as_ranges(done: torch.Tensor) -> list[Range]:
    """The reverse of `as_tensor`."""
    return [(first, amount) for first, amount in done.reshape(-1, 2).tolist()]
