"""Samples are claimed while the epoch runs, by whoever is free: each exactly once, and all members end together.

    numbers   [ first batch of 0 | of 1 | of 2 | drawn from a counter ..................... ]
                its own without asking           chunks of ~10 s, then ever smaller, then single batches

Every member has its first batch for certain (Lightning skips the validation of a rank without batches, and then the
others wait for it). When more is drawn, and who leaves first, is `claiming.py`'s. What a dead member left is taken over
by those still in the epoch (`sources.py`); what nobody can take is `abandoned`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_async.data.by_ledger import LedgerShare
from lightning_async.data.claiming import Claims
from lightning_async.data.crew import Desk
from lightning_async.data.opening import Opening
from lightning_async.data.order import Items
from lightning_async.data.pace import LoaderPace
from lightning_async.data.ranges import Range


class ClaimedShare(LedgerShare[Claims]):
    """One member's share of one epoch at a time, claimed by measured speed.

    Args:
        desk: The board and who is there.
        batch: This member's batch size in samples.
        drop_last: Whether incomplete batches are dropped; the end of the order that fills no batch is dropped for all.
        seconds: How much work is claimed ahead in mid-epoch.
    """

    def __init__(self, desk: Desk, *, batch: int, drop_last: bool = False, seconds: float = 10.0) -> None:
        if not seconds >= 0:
            raise ValueError(f"`seconds` must be at least 0, got {seconds}")
        self._seconds = seconds
        super().__init__(desk, batch=batch, drop_last=drop_last, pace=LoaderPace())

    def _begun(self, epoch: int, opening: Opening, *, done: Sequence[Range], items: Items) -> Claims:
        return Claims(
            self._desk,
            epoch,
            opening,
            done=done,
            batch=self._batch,
            seconds=self._seconds,
            pace=self._pace,
            handed=self._handed,
        )
