"""A share kept by a ledger: positions are handed out as they were claimed, and completed as they were handed out.

    work (which numbers are mine)  --hand out-->  on their way  --completed-->  ledger

The numbers are those of the epoch's rest: of all its positions, but for what an interrupted run has done of them. What
is handed out, and what is said to be done, are positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from lightning_async.data.crew import Desk
from lightning_async.data.handed import Handed
from lightning_async.data.ledger import Ledger
from lightning_async.data.opening import Opening, refuse_second_order, stamp, usable
from lightning_async.data.order import Items
from lightning_async.data.pace import Pace
from lightning_async.data.ranges import Range, Rest, each, joined
from lightning_async.data.work import Work
from lightning_async.transport.mail import Wait

W = TypeVar("W", bound=Work)


class LedgerShare(Generic[W]):
    """One member's share of one epoch at a time; by which rule it gets its numbers is said by subclasses.

    Args:
        desk: The board and who is there.
        batch: This member's batch size in samples.
        drop_last: Whether incomplete batches are dropped.
        pace: Measures this member's speed.
    """

    def __init__(self, desk: Desk, *, batch: int, drop_last: bool, pace: Pace) -> None:
        if batch < 1:
            raise ValueError(f"`batch` must be at least 1, got {batch}")
        self._desk = desk
        self._batch = batch
        self._drop_last = drop_last
        self._pace = pace
        self._work: W
        self._open(-1, Opening(0, 0, 0, 0), order=(0, 0), done=(), items=())

    @property
    def epoch(self) -> int:
        """The epoch that was begun last, -1 before the first one."""
        return self.ledger.epoch

    @property
    def ledger(self) -> Ledger:
        """What this member claimed and completed of the epoch."""
        return self._work.ledger

    @property
    def outstanding(self) -> int:
        """Samples handed out and not completed: in workers, prefetched, or being trained on."""
        return self._handed.outstanding

    @property
    def repeated(self) -> int:
        """Samples this member took over from the dead, who may have trained on some of them."""
        return self._work.repeated

    @property
    def rate(self) -> float:
        """This member's own speed in samples per second, 0 while unknown."""
        return self._pace.rate

    @property
    def dry(self) -> bool:
        """Whether this member takes no more work in this epoch and has trained on all it took."""
        return self._work.closed and not self.outstanding

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

        The first `limit` positions count, and those in `done` are left out.
        """
        if epoch == self.epoch:
            refuse_second_order(epoch, self._order, (total, digest))
            return
        span = total if limit is None else min(limit, total)
        used = self._usable(len(Rest(span, done)), len(self._desk.members()), resumed=bool(done))
        opening = Opening(total, span, used, stamp(digest, done))
        items = range(total) if items is None else items
        self._open(epoch, opening, order=(total, digest), done=tuple(done), items=items)
        self._work.offer()

    def rewind(self) -> None:
        """Hand out again what was handed out and not completed."""
        self._handed.back()

    def next_batch(self, size: int, *, spare: bool = False) -> Wait[list[int] | None]:
        """The next at most `size` positions, none of them for a `spare` batch that better waits; None: no more work."""
        yield from self._work.open()
        if spare and not self._work.closed and self._work.enough(self.outstanding + size):
            return []
        while self._work.held < size and not self._work.closed:
            more = yield from self._work.fetch(size)
            if not more:
                break
        return self._hand_out(size)

    def completed(self, samples: int | None = None) -> int:
        """Count the oldest batch handed out, or so many samples, as trained on; returns how many."""
        samples = self._handed.trained(samples)
        self.ledger.complete(samples)
        self._pace.completed(samples, self._desk.now())
        self._work.look()
        if self.dry:
            self._pace.stop()
        self._work.ask_ahead()
        return samples

    def done(self) -> list[Range]:
        """The positions that this member completed since the epoch was opened."""
        return joined(self._positions(self.ledger.done()))

    def left_out(self) -> list[Range]:
        """The positions that are nobody's in this epoch."""
        return []

    def expected_batches(self) -> int:
        """How many batches this member will probably have trained on at the end of the epoch."""
        return self._work.expected_batches()

    def abandoned(self) -> int:
        """Samples of the epoch that nobody trained on, by all notes; too many as long as not `settled`."""
        return max(0, self._work.left_over() - self.dropped)

    def settled(self) -> bool:
        """Whether every living member is known to have ended the epoch."""
        return self.dry and self._work.others_ended()

    def memory(self) -> dict[str, Tensor]:
        """What the next run may use of this one, whatever the epoch."""
        return {}

    def recall(self, memory: dict[str, Tensor]) -> None:
        """Use it. Before the first epoch."""

    # -- one epoch -----------------------------------------------------------------------------------------------------

    def _begun(self, epoch: int, opening: Opening, *, done: Sequence[Range], items: Items) -> W:
        """The work of an epoch that is about to open."""
        raise NotImplementedError  # it is the rule in which the shares differ

    def _open(
        self, epoch: int, opening: Opening, *, order: tuple[int, int], done: tuple[Range, ...], items: Items
    ) -> None:
        self.dropped = 0
        self._order = order
        self._handed = Handed()
        self._work = self._begun(epoch, opening, done=done, items=items)

    def _usable(self, left: int, members: int, *, resumed: bool) -> int:
        """How many of the numbers are handed out."""
        unit = self._batch if self._drop_last else 1
        if resumed or left >= members * unit:
            return usable(left, members=members, unit=unit)
        if not self._drop_last:
            raise ValueError(f"{left} samples cannot be shared by {members} members: each needs at least one")
        raise ValueError(
            f"{left} samples make {left // unit} whole batches of {unit}, and each of {members} members needs one: "
            "leave out `drop_last=True`, or take smaller batches or fewer ranks"
        )

    def _positions(self, numbers: Iterable[Range]) -> list[Range]:
        return [part for numbered in numbers for part in self._work.numbers.positions(*numbered)]

    def _hand_out(self, size: int) -> list[int] | None:
        work = self._work
        amount = min(size, work.held)
        if amount == 0 or (self._drop_last and amount < size):
            self.dropped += 0 if work.closed else amount
            work.close()
            return None
        batch = each(self._positions(self.ledger.ahead(self.outstanding, amount)))
        self._handed.give(amount)
        self._pace.start(self._desk.now())
        work.ask_ahead()
        return batch
