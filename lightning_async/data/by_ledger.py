"""A share kept by a ledger: numbers that are this member's, handed out in that order, and completed in that order.

    offer the opening -> opened, first claim -> hand out, complete, fetch more, ... -> nothing more: closed

Which numbers those are is said by the balance: `claim.py` draws them from a counter, `incremental.py` has them
allotted. The numbers are those of the epoch's rest (`ranges.Rest`). Ledgers, notes and tickets go by numbers; what is
handed out, and what is said to be done, are positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from lightning_async.data.crew import Crew, Desk
from lightning_async.data.handed import Handed
from lightning_async.data.ledger import Ledger, Note
from lightning_async.data.opening import Opening, refuse_other_order, refuse_second_order, stamp, usable
from lightning_async.data.order import Items
from lightning_async.data.pace import Pace
from lightning_async.data.ranges import Range, Rest, each, joined
from lightning_async.transport.mail import Wait


class Numbered(Protocol):
    """The positions of an epoch under the numbers by which they are shared out."""

    def positions(self, first: int, amount: int) -> Iterable[Range]:
        """The positions that have the `amount` numbers from `first` on."""


class LedgerShare:
    """One member's share of one epoch at a time; where its numbers come from is left to subclasses.

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
        self._order = (0, 0)
        self._done: tuple[Range, ...] = ()
        self._opening = Opening(0, 0, 0, 0)
        self._rest: Numbered = Rest(0)
        self._crew: Crew | None = None
        self._forget(-1)

    @property
    def epoch(self) -> int:
        """The epoch that was begun last, -1 before the first one."""
        return self.ledger.epoch

    @property
    def outstanding(self) -> int:
        """Samples handed out and not completed: in workers, prefetched, or being trained on."""
        return self._handed.outstanding

    @property
    def rate(self) -> float:
        """This member's own speed in samples per second, 0 while unknown."""
        return self._pace.rate

    @property
    def dry(self) -> bool:
        """Whether this member takes no more work in this epoch and has trained on all it took."""
        return self._closed and not self.outstanding

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
        members = self._desk.members()
        span = total if limit is None else min(limit, total)
        used = self._usable(len(Rest(span, done)), len(members), resumed=bool(done))
        self._forget(epoch)
        self._order, self._done = (total, digest), tuple(done)
        self._opening = Opening(total, span, used, stamp(digest, done))
        self._offer()

    def rewind(self) -> None:
        """Hand out again what was handed out and not completed."""
        self._handed.back()

    def next_batch(self, size: int) -> Wait[list[int] | None]:
        """The next at most `size` positions; None when this member has no more work in this epoch."""
        yield from self._open()
        while self._held < size and not self._closed:
            more = yield from self._fetch(size)
            if not more:
                break
        return self._hand_out(size)

    def completed(self, samples: int | None = None) -> int:
        """Count the oldest batch handed out, or so many samples, as trained on; returns how many."""
        samples = self._handed.trained(samples)
        self.ledger.complete(samples)
        self._pace.completed(samples, self._desk.now())
        self._look()
        if self._closed and not self.outstanding:
            self._pace.stop()
        self._ask_ahead()
        return samples

    def done(self) -> list[Range]:
        """The positions that this member completed since the epoch was opened."""
        return joined(self._positions(self.ledger.done()))

    def left_out(self) -> list[Range]:
        """The positions that are nobody's in this epoch."""
        return []

    def abandoned(self) -> int:
        """Samples of the epoch that nobody trained on, by all notes; too many as long as not `settled`.

        Nothing is left over while nobody died.
        """
        if self._crew is None or not self._crew.dead():
            return 0
        self._crew.listen()
        return max(0, self._opening.used - self._crew.completed() - self.dropped)

    def settled(self) -> bool:
        """Whether every living member is known to have ended the epoch."""
        if self._crew is None:
            return False
        self._crew.listen()
        return self._closed and not self.outstanding and self._crew.ended()

    def memory(self) -> dict[str, torch.Tensor]:
        """What the next run may use of this one, whatever the epoch."""
        return {}

    def recall(self, memory: dict[str, torch.Tensor]) -> None:
        """Use it. Before the first epoch."""

    # ---- what a balance says

    def _offer(self) -> None:
        """Propose the opening, once, as soon as that can be done."""
        raise NotImplementedError

    def _opened(self, opening: Opening) -> None:
        """All agreed on this opening: claim this member's first numbers."""
        self._opening, self._rest = opening, Rest(opening.span, self._done)
        self._crew = Crew(self._desk, self.epoch, opening)

    def _fetch(self, size: int) -> Wait[bool]:
        """Wait for more numbers; False when there are none for this member."""
        raise NotImplementedError

    def _ask_ahead(self) -> None:
        """Ask for more before it is needed; never waits."""
        raise NotImplementedError

    @property
    def _reach(self) -> int:
        """The end of this member's claims from the epoch's own pool, if there is one."""
        return 0

    # ---- one epoch

    def _forget(self, epoch: int) -> None:
        self.ledger = Ledger(epoch)
        self.dropped = 0
        self._handed = Handed()
        self._closed = self._offered = False
        self._rest, self._crew = Rest(0), None

    def _usable(self, left: int, members: int, *, resumed: bool) -> int:
        """How many of the numbers are handed out."""
        unit = self._unit
        if resumed or left >= members * unit:
            return usable(left, members=members, unit=unit)
        if not self._drop_last:
            raise ValueError(f"{left} samples cannot be shared by {members} members: each needs at least one")
        return 0

    @property
    def _unit(self) -> int:
        return self._batch if self._drop_last else 1

    def _first(self, members: int) -> int:
        """The samples that every member has for certain."""
        used = self._opening.used
        return max(1, min(self._batch, used // members)) if used else 0

    def _propose(self, seats: Iterable[Range]) -> None:
        self._offered = True
        self._opening = replace(self._opening, seats=tuple(seats))
        self._desk.propose(self._key("open"), self._opening.pack())

    def _positions(self, numbers: Iterable[Range]) -> list[Range]:
        return [part for first, amount in numbers for part in self._rest.positions(first, amount)]

    def _key(self, what: str) -> str:
        return f"data/{what}/{self.epoch}"

    def _open(self) -> Wait[None]:
        """Learn what was decided about this epoch and take the first numbers."""
        while self._crew is None:
            if not self._offered:
                self._offer()
            value = self._desk.decided(self._key("open"))
            if value is None:
                yield f"the opening of epoch {self.epoch}"
                continue
            opening = Opening.unpack(value)
            refuse_other_order(self.epoch, self._opening, opening)
            self._opened(opening)
            self._look()

    @property
    def _held(self) -> int:
        return self.ledger.outstanding - self.outstanding

    def _hand_out(self, size: int) -> list[int] | None:
        amount = min(size, self._held)
        if amount == 0 or (self._drop_last and amount < size):
            self.dropped += 0 if self._closed else amount
            self._close()
            return None
        batch = each(self._positions(self.ledger.ahead(self.outstanding, amount)))
        self._handed.give(amount)
        self._pace.start(self._desk.now())
        self._ask_ahead()
        return batch

    def _close(self) -> None:
        self._closed = True
        self._look()

    def _look(self) -> None:
        """Hear the others, and let them know."""
        if self._crew is None:
            return
        open_ranges, done, claimed = tuple(self.ledger.unfinished()), self.ledger.completed, self.ledger.claimed
        note = Note(self.epoch, self._batch, self._pace.rate, self._closed, done, claimed, self._reach, open_ranges)
        self._desk.publish(note.pack())
        self._crew.listen()

    def _equal_part(self) -> int:
        """The batches of an equal part, while nothing better is known."""
        return math.ceil(self._opening.used / max(1, len(self._desk.members())) / self._batch)
