r"""A share says which positions of the epoch's order this member trains on next, until there is nothing for it.

    begin_epoch -> next_batch, next_batch, ... -> None
                       \ completed, completed, ...         told by the strategy after each training batch

Positions that were handed out and not completed are handed out again after `rewind` (a new iterator over the same
epoch), so nothing is lost with an abandoned prefetch queue. An epoch that was interrupted goes on with what is left of
it, by whatever members there are then: each tells what it has `done`, and the next run begins without all of that.

`"equal"`: the counts of a DistributedSampler. `"claim"`: by measured speed, each position exactly once.
`"incremental"`: the same in a few parts, which all know (IDPA).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lightning_async.data.balance import Balance, knobs_of, refuse_unknown
from lightning_async.data.claim import ClaimedShare
from lightning_async.data.crew import Desk
from lightning_async.data.equal import EqualShare
from lightning_async.data.incremental import IncrementalShare
from lightning_async.data.kept import KeptShare
from lightning_async.data.order import Items
from lightning_async.data.ranges import Range
from lightning_async.transport.mail import Wait

__all__ = ["Balance", "Share", "make_share"]


class Share(Protocol):
    """One member's part of the epoch, in positions of the order that all members share."""

    @property
    def epoch(self) -> int:
        """The epoch that was begun last, -1 before the first one."""

    @property
    def outstanding(self) -> int:
        """Samples handed out and not completed: in workers, prefetched, or being trained on."""

    @property
    def dry(self) -> bool:
        """Whether this member gets nothing more in this epoch and has trained on all it got."""

    def begin_epoch(
        self,
        epoch: int,
        *,
        total: int,
        digest: int = 0,
        done: Sequence[Range] = (),
        limit: int | None = None,
        items: Items | None = None,
    ) -> None:
        """Open `epoch` over an order with this length and fingerprint; the one under way is left as it is.

        Args:
            epoch: Its number.
            total: The length of the order.
            digest: The fingerprint of the order.
            done: What all members of an interrupted run have done of it together: left out.
            limit: How many of the first positions count; None: all.
            items: What the positions stand for; None: the samples 0, 1, 2, ... of the data set.
        """

    def rewind(self) -> None:
        """Hand out again what was handed out and not completed."""

    def next_batch(self, size: int, *, spare: bool = False) -> Wait[list[int] | None]:
        """The next at most `size` positions; None when this member has no more work in this epoch.

        A `spare` batch is one that nobody waits for: for it there may be no positions now, and more later.
        """

    def completed(self, samples: int | None = None) -> int:
        """Count the oldest batch handed out, or so many samples, as trained on; returns how many."""

    def done(self) -> list[Range]:
        """The positions of the order that this member completed since the epoch was opened; not what was left out."""

    def left_out(self) -> list[Range]:
        """The positions that are nobody's in this epoch."""

    def expected_batches(self) -> int:
        """How many batches this member will probably have trained on at the end of the epoch."""

    def abandoned(self) -> int:
        """Samples of the epoch that nobody will train on, for a warning; too many as long as not `settled`."""

    def settled(self) -> bool:
        """Whether every living member is known to have ended the epoch."""

    def memory(self) -> dict[str, Tensor]:
        """What the next run may use of this one, whatever the epoch."""

    def recall(self, memory: dict[str, Tensor]) -> None:
        """Use it. Before the first epoch."""


def make_share(
    balance: Balance, desk: Desk, *, batch: int, drop_last: bool = False, seconds: float = 10.0, size: int = 0
) -> Share:
    """The share of this member.

    Args:
        balance: A word, or IDPA's knobs.
        desk: The board and who is there.
        batch: This member's batch size in samples.
        drop_last: Whether incomplete batches are dropped.
        seconds: How much work is claimed ahead in mid-epoch; for `"claim"`.
        size: How many samples the data set has; for `partition="kept"`.
    """
    refuse_unknown(balance)
    if balance == "claim":
        return ClaimedShare(desk, batch=batch, drop_last=drop_last, seconds=seconds)
    if balance == "equal":
        return EqualShare(desk, batch=batch, drop_last=drop_last)
    knobs = knobs_of(balance)
    if knobs.partition == "kept":
        return KeptShare(desk, knobs, size=size, batch=batch, drop_last=drop_last)
    return IncrementalShare(desk, knobs, batch=batch, drop_last=drop_last)
