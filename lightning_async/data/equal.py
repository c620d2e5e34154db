"""The counts of a DistributedSampler: member k of n trains on numbers k, k+n, k+2n, ..., as many as every other one.

    rest       0 1 2 3 4 5 6 7 8 9 | 0 1        n = 4: two samples come twice (`pad`), or 8 and 9 are dropped
    member 1     1       5       9

The numbers are those of the epoch's rest (`ranges.Rest`): all positions, but for what an interrupted run has done of
them. Speeds do not count and the dead are not replaced. What is done cannot be said in a few ranges, as for claims: it
is about one range a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lightning_async.data.crew import Desk
from lightning_async.data.handed import Handed
from lightning_async.data.ledger import Note
from lightning_async.data.opening import Opening, refuse_other_order, refuse_second_order, stamp, usable
from lightning_async.data.order import Items
from lightning_async.data.ranges import Range, Rest, joined
from lightning_async.transport.mail import Wait


class EqualShare:
    """Equal shares of every epoch.

    Args:
        desk: The board and who is there.
        batch: This member's batch size in samples.
        drop_last: Whether an incomplete last batch is dropped.
        pad: Repeat samples so that all have equally many; else the surplus is dropped.
    """

    def __init__(self, desk: Desk, *, batch: int, drop_last: bool = False, pad: bool = True) -> None:
        if batch < 1:
            raise ValueError(f"`batch` must be at least 1, got {batch}")
        self._desk = desk
        self._batch = batch
        self._drop_last = drop_last
        self._pad = pad
        self._members = desk.members()
        self._handed = Handed()
        self._completed = 0
        self._order = (0, 0)
        self._done: tuple[Range, ...] = ()
        self._opening = Opening(0, 0, 0, 0)
        self._rest = Rest(0)
        self._agreed = False
        self.epoch = -1

    @property
    def outstanding(self) -> int:
        """Samples handed out and not completed."""
        return self._handed.outstanding

    @property
    def dry(self) -> bool:
        """Whether this member has trained on all its samples of this epoch."""
        return self._agreed and self._completed >= self._goal()

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
        """Open `epoch`; the members are those of the construction: a death shifts nobody's positions.

        The first `limit` positions count, and those in `done` are left out.
        """
        if epoch == self.epoch:
            refuse_second_order(epoch, self._order, (total, digest))
            return
        if total < 1:
            raise ValueError("There are no samples to train on: `total` must be at least 1, got 0")
        span = total if limit is None else min(limit, total)
        self._order, self._done = (total, digest), tuple(done)
        self._rest = Rest(span, done)
        self._opening = Opening(total, span, self._used(len(self._rest)), stamp(digest, done))
        self._handed = Handed()
        self._completed = 0
        if self._drop_last and not done and not self._goal():
            raise ValueError(
                f"{span} samples make no whole batch of {self._batch} for each of {len(self._members)} members: "
                "leave out `drop_last=True`, or take smaller batches or fewer ranks"
            )
        self._agreed, self.epoch = False, epoch
        self._desk.propose(f"data/order/{epoch}", self._opening.pack())

    def rewind(self) -> None:
        """Hand out again what was handed out and not completed."""
        self._handed.back()

    def next_batch(self, size: int, *, spare: bool = False) -> Wait[list[int] | None]:
        """The next at most `size` positions, None at the end."""
        yield from self._agree()
        begin = self._completed + self.outstanding
        batch = self._numbers(self._desk.me)[begin : begin + size]
        if not batch or (self._drop_last and len(batch) < size):
            return None
        self._handed.give(len(batch))
        return [self._rest.position(number) for number in batch]

    def completed(self, samples: int | None = None) -> int:
        """Count the oldest batch handed out, or so many samples, as trained on; returns how many."""
        samples = self._handed.trained(samples)
        self._completed += samples
        closed = self._completed >= self._goal()
        self._desk.publish(Note(self.epoch, self._batch, 0.0, closed, self._completed, self._goal()).pack())
        return samples

    def done(self) -> list[Range]:
        """The positions that this member completed since the epoch was opened."""
        numbers = self._numbers(self._desk.me)[: self._completed]
        return joined((self._rest.position(number), 1) for number in numbers)

    def left_out(self) -> list[Range]:
        """None: every position is somebody's, but for a surplus that is dropped."""
        return []

    def expected_batches(self) -> int:
        """This member's number of batches; exact."""
        return math.ceil(self._goal() / self._batch)

    def abandoned(self) -> int:
        """What dead members had not completed by their last note."""
        notes = {rank: Note.unpack(raw) for rank, raw in self._desk.notes().items()}
        dead = [notes.get(rank) for rank in self._members if rank not in self._desk.members()]
        own = len(self._numbers(self._desk.me))
        return sum(own - n.completed if n and n.epoch == self.epoch else own for n in dead)

    def settled(self) -> bool:
        """Whether every living member is known to have ended the epoch."""
        notes = {rank: Note.unpack(raw) for rank, raw in self._desk.notes().items()}
        living = set(self._members) & set(self._desk.members())
        return all(r in notes and (notes[r].epoch, notes[r].closed) >= (self.epoch, True) for r in living)

    def memory(self) -> dict[str, Tensor]:
        """Nothing: speeds do not count."""
        return {}

    def recall(self, memory: dict[str, Tensor]) -> None:
        """See `memory`."""

    def _numbers(self, rank: int) -> range:
        return range(self._members.index(rank), self._opening.used, len(self._members))

    def _used(self, left: int) -> int:
        """Equally many for each; of an epoch that goes on at least a batch, as long as there is one."""
        n, unit = len(self._members), self._batch if self._drop_last else 1
        if self._done:
            left = usable(left, members=n, unit=unit)
        return n * (math.ceil(left / n) if self._pad else left // n)

    def _goal(self) -> int:
        whole = len(self._numbers(self._desk.me))
        return whole - whole % self._batch if self._drop_last else whole

    def _agree(self) -> Wait[None]:
        while not self._agreed:
            value = self._desk.decided(f"data/order/{self.epoch}")
            if value is None:
                yield f"the order of epoch {self.epoch}"
                continue
            opening = Opening.unpack(value)
            refuse_other_order(self.epoch, self._opening, opening)
            self._opening, self._rest, self._agreed = opening, Rest(opening.span, self._done), True
