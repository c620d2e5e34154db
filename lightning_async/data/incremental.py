"""IDPA, all samples of every epoch: each epoch's order is shuffled as ever, and its parts are allotted as it goes on.

    epoch    part 1 | part 2 | ... | part A        by what was measured so far, in this epoch and in those before it

A sample is anybody's in the next epoch, so nobody trains on a biased part of the data (`kept.py` is the other form).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from lightning_async.data.allotting import Parts
from lightning_async.data.balance import Incremental
from lightning_async.data.by_ledger import LedgerShare
from lightning_async.data.crew import Desk
from lightning_async.data.opening import Opening
from lightning_async.data.order import Items
from lightning_async.data.ranges import Range
from lightning_async.data.speeds import MeanPace, Speeds

P = TypeVar("P", bound=Parts)


class AllottedShare(LedgerShare[P]):
    """What both forms have: knobs, and speeds that outlast the epochs.

    Args:
        desk: The board and who is there.
        knobs: How many parts, and what they go by.
        batch: This member's batch size in samples.
        drop_last: Whether incomplete batches are dropped.
        probe: Measures this member's nominal speed.
    """

    def __init__(
        self,
        desk: Desk,
        knobs: Incremental,
        *,
        batch: int,
        drop_last: bool = False,
        probe: Callable[[], float] | None = None,
    ) -> None:
        self._knobs = knobs
        self._speeds = Speeds(desk, knobs.nominal, probe)
        super().__init__(desk, batch=batch, drop_last=drop_last, pace=MeanPace(knobs.memory))

    def memory(self) -> dict[str, Tensor]:
        """The speeds."""
        return {"speeds": self._speeds.memory()}

    def recall(self, memory: dict[str, Tensor]) -> None:
        """Begin with the speeds that an earlier run measured."""
        if "speeds" in memory:
            self._speeds.recall(memory["speeds"])


class IncrementalShare(AllottedShare[Parts]):
    """One member's share of one epoch at a time, allotted in parts."""

    def _begun(self, epoch: int, opening: Opening, *, done: Sequence[Range], items: Items) -> Parts:
        return Parts(
            self._desk,
            epoch,
            opening,
            done=done,
            batch=self._batch,
            pace=self._pace,
            handed=self._handed,
            speeds=self._speeds,
            count=self._knobs.parts,
        )
