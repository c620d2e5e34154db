"""IDPA as its paper has it: each of the first epochs adds a part to what the members own, and nothing is ever moved.

    epoch     1          2            3            4 ..
    owned     N/A        2 N/A        3 N/A        N            all that is owned is trained on, once an epoch
    part 1    nominal
    part 2..             each so that an epoch over all that a member owns would take all equally long

So a node's own disk can keep its samples (`samples`). The first epochs are short: K epochs' worth of samples takes
K + (A-1)/2 epochs. What a member is slower at later is not moved; what a dead one owned is added to the others, in the
same way, from the next epoch on; in the epoch of its death it is drawn by those still in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_async.data.allotting import Parts
from lightning_async.data.balance import Incremental
from lightning_async.data.crew import Crew, Desk
from lightning_async.data.incremental import AllottedShare
from lightning_async.data.opening import Opening
from lightning_async.data.order import Items
from lightning_async.data.partition import NOBODY, ByOwner, Partition, positions_of
from lightning_async.data.ranges import Range, joined


class KeptParts(Parts):
    """What one member owns of one epoch: all at once, when it is known who owns what.

    Args:
        partition: Who owned what in the epoch before; this epoch's part is added to it.
        items: What the positions stand for.
        least: Samples that every member must have.
        rest: See `Parts`.
    """

    def __init__(self, *place: Any, partition: Partition, items: Items, least: int, **rest: Any) -> None:
        super().__init__(*place, **rest)
        self.nobodys = torch.empty(0, dtype=torch.int64)
        self._partition, self._items, self._least = partition, items, least

    def seats(self) -> Iterable[Range] | None:
        """What each is to own besides: a part, once an epoch, and what those had that are gone."""
        members, own = self._desk.members(), self._partition
        if self._speeds.missing(members):
            return None
        more = own.epoch < self.ledger.epoch
        new = self._part_of(own.size, given=own.given, members=len(members)) if more else 0
        freed = sum(amount for _, amount in own.freed(members))
        least = self._batch if not own.given else 0
        return self._sizes(members, new + freed, own.kept(members), least=least)

    def opened(self, opening: Opening) -> None:
        """Add it, and number the epoch's positions member by member."""
        self._partition.add(self.ledger.epoch, opening.seats)
        owners = positions_of(self._partition.owners(), self._items, opening.span)
        self.nobodys = (owners == NOBODY).nonzero().reshape(-1)
        for first, amount in self._done:
            owners[first : first + amount] = NOBODY
        self.numbers = numbers = ByOwner(owners, [rank for rank, _ in opening.seats], least=self._least)
        self.opening = replace(opening, used=len(numbers), seats=numbers.seats)
        self._crew = Crew(self._desk, self.ledger.epoch, self.opening)
        self._enter(numbers.seats)


class KeptShare(AllottedShare[KeptParts]):
    """One member's share of every epoch: the samples it owns.

    Args:
        desk: The board and who is there.
        knobs: How many parts, and what they go by.
        size: How many samples the data set has.
        batch: This member's batch size in samples.
        drop_last: Whether incomplete batches are dropped.
        probe: Measures this member's nominal speed.
    """

    def __init__(
        self,
        desk: Desk,
        knobs: Incremental,
        *,
        size: int,
        batch: int,
        drop_last: bool = False,
        probe: Callable[[], float] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(
                "`partition='kept'` needs a DataLoader with a `batch_size` and a data set with a length; use 'redrawn'"
            )
        self.partition = Partition(size)
        super().__init__(desk, knobs, batch=batch, drop_last=drop_last, probe=probe)

    def samples(self) -> Tensor:
        """The samples that this member owns by now, by their index in the data set."""
        return self.partition.samples(self._desk.me)

    def left_out(self) -> list[Range]:
        """The positions that are nobody's in this epoch: their samples are not allotted yet."""
        return joined((position, 1) for position in self._work.nobodys.tolist())

    def memory(self) -> dict[str, Tensor]:
        """The speeds, and who owns what."""
        return {**super().memory(), **self.partition.state_dict()}

    def recall(self, memory: dict[str, Tensor]) -> None:
        """Go on with what an earlier run measured and gave out."""
        super().recall(memory)
        if "partition" in memory:
            self.partition.load_state_dict(memory)

    def _begun(self, epoch: int, opening: Opening, *, done: Sequence[Range], items: Items) -> KeptParts:
        return KeptParts(
            self._desk,
            epoch,
            opening,
            done=done,
            batch=self._batch,
            pace=self._pace,
            handed=self._handed,
            speeds=self._speeds,
            count=self._knobs.parts,
            partition=self.partition,
            items=items,
            least=self._batch if self._drop_last else 1,
        )
