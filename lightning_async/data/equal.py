"""The counts of a DistributedSampler: member k of n trains on positions k, k+n, k+2n, ..., as many as every other one.

    order      0 1 2 3 4 5 6 7 8 9 | 0 1        n = 4: two positions come twice (`pad`), or 8 and 9 are dropped
    member 1     1       5       9

Speeds do not count and the dead are not replaced.
"""

from __future__ import annotations

import math
import struct

from lightning_async.data.crew import Desk
from lightning_async.data.handed import Handed
from lightning_async.data.ledger import Note
from lightning_async.transport.mail import Wait

_OPENING = struct.Struct("<QQ")


class EqualShare:
    """Equal shares of every epoch.

    Args:
        desk: The board and who is there.
        batch: This member's batch size in samples.
        drop_last: Whether an incomplete last batch is dropped.
        pad: Repeat positions so that all have equally many; else the surplus is dropped.
    """

    def __init__(self, desk: Desk, *, batch: int, drop_last: bool = False, pad: bool = True) -> None:
        if batch < 1:
            raise ValueError(f"`batch` must be at least 1, got {batch}")
        self._desk = desk
        self._batch = batch
        self._drop_last = drop_last
        self._pad = pad
        self._members = desk.members()
        self._positions: list[int] = []
        self._handed = Handed()
        self._completed = 0
        self._opening = (0, 0)
        self._agreed = False
        self.epoch = -1

    @property
    def outstanding(self) -> int:
        """Samples handed out and not completed."""
        return self._handed.outstanding

    def begin_epoch(self, epoch: int, *, total: int, digest: int = 0) -> None:
        """Open `epoch`; the members are those of the construction: a death shifts nobody's positions."""
        if epoch == self.epoch:
            refuse_second_order(epoch, self._opening, (total, digest))
            return
        if total < 1:
            raise ValueError("There are no samples to train on: `total` must be at least 1, got 0")
        n = len(self._members)
        count = math.ceil(total / n) if self._pad else total // n
        mine = self._members.index(self._desk.me)
        self._positions = [p % total for p in range(mine, count * n, n)]
        self._handed = Handed()
        self._completed = 0
        self._opening, self._agreed, self.epoch = (total, digest), False, epoch
        self._desk.propose(f"data/order/{epoch}", _OPENING.pack(total, digest))

    def rewind(self) -> None:
        """Hand out again what was handed out and not completed."""
        self._handed.back()

    def next_batch(self, size: int) -> Wait[list[int] | None]:
        """The next at most `size` positions, None at the end."""
        yield from self._agree()
        begin = self._completed + self.outstanding
        batch = self._positions[begin : begin + size]
        if not batch or (self._drop_last and len(batch) < size):
            return None
        self._handed.give(len(batch))
        return batch

    def completed(self, samples: int | None = None) -> None:
        """Count the oldest batch handed out, or so many samples, as trained on."""
        self._completed += self._handed.trained(samples)
        closed = self._completed >= self._goal()
        self._desk.publish(Note(self.epoch, self._batch, 0.0, closed, self._completed, self._goal()).pack())

    def expected_batches(self) -> int:
        """This member's number of batches; exact."""
        return math.ceil(self._goal() / self._batch)

    def abandoned(self) -> int:
        """What dead members had not completed by their last note."""
        notes = {rank: Note.unpack(raw) for rank, raw in self._desk.notes().items()}
        dead = [notes.get(rank) for rank in self._members if rank not in self._desk.members()]
        own = len(self._positions)
        return sum(own - n.completed if n and n.epoch == self.epoch else own for n in dead)

    def settled(self) -> bool:
        """Whether every living member is known to have ended the epoch."""
        notes = {rank: Note.unpack(raw) for rank, raw in self._desk.notes().items()}
        living = set(self._members) & set(self._desk.members())
        return all(r in notes and (notes[r].epoch, notes[r].closed) >= (self.epoch, True) for r in living)

    def _goal(self) -> int:
        whole = len(self._positions)
        return whole - whole % self._batch if self._drop_last else whole

    def _agree(self) -> Wait[None]:
        while not self._agreed:
            value = self._desk.decided(f"data/order/{self.epoch}")
            if value is None:
                yield f"the order of epoch {self.epoch}"
                continue
            refuse_other_order(self.epoch, self._opening, _OPENING.unpack(value))
            self._agreed = True


def refuse_other_order(epoch: int, mine: tuple[int, ...], decided: tuple[int, ...]) -> None:
    """Raise if this member's (length, fingerprint) of the order is not the one all agreed on."""
    if mine[0] != decided[0]:
        raise ValueError(
            f"The members disagree on the size of epoch {epoch}: {mine[0]} samples here, {decided[0]} there"
        )
    if mine[1] != decided[1]:
        raise ValueError(
            f"The members disagree on the order of epoch {epoch}: the sampler must give the same indices on every "
            "rank; seed it from the epoch alone, not from the rank or from a random state that training changes"
        )


def refuse_second_order(epoch: int, mine: tuple[int, ...], other: tuple[int, ...]) -> None:
    """Raise if one share is asked to feed two unlike loaders."""
    if mine != other:
        raise ValueError(
            f"Epoch {epoch} was begun with another order: a share feeds one loader, so train with a single DataLoader "
            "(a data set that returns tuples can stand for several)"
        )
