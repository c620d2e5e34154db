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

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_async.data.balance import Incremental
from lightning_async.data.crew import Crew, Desk
from lightning_async.data.incremental import IncrementalShare
from lightning_async.data.opening import Opening
from lightning_async.data.order import Items
from lightning_async.data.partition import NOBODY, ByOwner, Partition, positions_of
from lightning_async.data.ranges import Range, joined


class KeptShare(IncrementalShare):
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
        """Open `epoch`; `items` says which sample each position stands for."""
        if epoch != self.epoch:
            self._items: Items = range(total) if items is None else items
        super().begin_epoch(epoch, total=total, digest=digest, done=done, limit=limit)

    def samples(self) -> Tensor:
        """The samples that this member owns by now, by their index in the data set."""
        return self.partition.samples(self._desk.me)

    def left_out(self) -> list[Range]:
        """The positions that are nobody's in this epoch: their samples are not allotted yet."""
        return joined((position, 1) for position in self._nobodys.tolist())

    def memory(self) -> dict[str, Tensor]:
        """The speeds, and who owns what."""
        return {**super().memory(), **self.partition.state_dict()}

    def recall(self, memory: dict[str, Tensor]) -> None:
        """Go on with what an earlier run measured and gave out."""
        super().recall(memory)
        if "partition" in memory:
            self.partition.load_state_dict(memory)

    # ---- one epoch

    def _forget(self, epoch: int) -> None:
        super()._forget(epoch)
        self._nobodys = torch.empty(0, dtype=torch.int64)

    def _offer(self) -> None:
        members, own = self._desk.members(), self.partition
        if self._speeds.missing(members):
            return
        more = own.epoch < self.epoch
        new = self._part_of(own.size, given=own.given, members=len(members)) if more else 0
        freed = sum(amount for _, amount in own.freed(members))
        least = self._batch if not own.given else 0
        self._propose(self._sizes(members, new + freed, own.kept(members), least=least))

    def _opened(self, opening: Opening) -> None:
        self.partition.add(self.epoch, opening.seats)
        members = [rank for rank, _ in opening.seats]
        owners = positions_of(self.partition.owners(), self._items, opening.span, ())
        self._nobodys = (owners == NOBODY).nonzero().reshape(-1)
        for first, amount in self._done:
            owners[first : first + amount] = NOBODY
        self._rest = numbers = ByOwner(owners, members, least=self._unit)
        self._opening = replace(opening, used=len(numbers), seats=numbers.seats)
        self._crew = Crew(self._desk, self.epoch, self._opening)
        self._enter(self._opening.seats)
