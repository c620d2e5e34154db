"""One epoch's numbers of one member: which are its own, which of those are done, and what the others know of it.

    offer the opening -> opened: the first numbers -> fetch more, a moment before it is needed -> close

By which rule a member gets its numbers is said by subclasses: drawn from a counter (`claiming.py`), or allotted in
parts (`allotting.py`). The numbers are those of the epoch's rest (`ranges.Rest`). Ledgers and notes go by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from lightning_async.data.crew import Crew, Desk
from lightning_async.data.handed import Handed
from lightning_async.data.ledger import Ledger, Note
from lightning_async.data.opening import Opening, refuse_other_order
from lightning_async.data.pace import Pace
from lightning_async.data.ranges import Range, Rest
from lightning_async.transport.mail import Wait


class Numbered(Protocol):
    """The positions of an epoch, under the numbers by which they are shared out."""

    def positions(self, first: int, amount: int) -> Iterable[Range]:
        """The positions that have the `amount` numbers from `first` on."""


class Work:
    """What one member has of one epoch.

    Args:
        desk: The board and who is there.
        epoch: The epoch.
        opening: As this member would open it, but for the seats.
        done: The positions that are left out.
        batch: This member's batch size in samples.
        pace: This member's speed.
        handed: What of its numbers is on its way.

    Attributes:
        opening: As all agreed on it, once they did.
        numbers: The positions that are shared out.
        ledger: What was claimed and completed.
        closed: Whether this member takes nothing more.
        repeated: Samples taken over from the dead.
    """

    def __init__(
        self, desk: Desk, epoch: int, opening: Opening, *, done: Sequence[Range], batch: int, pace: Pace, handed: Handed
    ) -> None:
        self.opening = opening
        self.numbers: Numbered = Rest(0)
        self.ledger = Ledger(epoch)
        self.closed = False
        self._desk, self._done = desk, done
        self._batch, self._pace, self._handed = batch, pace, handed
        self._crew: Crew | None = None
        self._offered = False

    @property
    def repeated(self) -> int:
        """Samples taken over from the dead."""
        raise NotImplementedError

    @property
    def held(self) -> int:
        """Samples claimed and not handed out."""
        return self.ledger.outstanding - self._handed.outstanding

    def open(self) -> Wait[None]:
        """Learn what was decided about this epoch and take the first numbers."""
        epoch = self.ledger.epoch
        while self._crew is None:
            self.offer()
            value = self._desk.decided(key("open", epoch))
            if value is None:
                yield self.awaited()
                continue
            opening = Opening.unpack(value)
            refuse_other_order(epoch, self.opening, opening)
            self.opened(opening)
            self.look()

    def offer(self) -> None:
        """Propose the opening, once, as soon as the seats are known."""
        if not self._offered and (seats := self.seats()) is not None:
            self._offered = True
            self.opening = replace(self.opening, seats=tuple(seats))
            self._desk.propose(key("open", self.ledger.epoch), self.opening.pack())

    def close(self) -> None:
        """Take nothing more in this epoch."""
        self.closed = True
        self.look()

    def look(self) -> None:
        """Hear the others, and let them know."""
        if self._crew is None:
            return
        ledger = self.ledger
        note = Note(
            ledger.epoch,
            self._batch,
            self._pace.rate,
            self.closed,
            ledger.completed,
            ledger.claimed,
            self.reach,
            tuple(ledger.unfinished()),
        )
        self._desk.publish(note.pack(), soon=self.near)
        self._crew.listen()

    def left_over(self) -> int:
        """Samples that nobody trained on, by all notes. Nothing is left over while nobody died."""
        if self._crew is None or not self._crew.dead():
            return 0
        self._crew.listen()
        return max(0, self.opening.used - self._crew.completed())

    def others_ended(self) -> bool:
        """Whether all others that live are known to have ended the epoch."""
        if self._crew is None:
            return False
        self._crew.listen()
        return self._crew.ended()

    # -- the rule ------------------------------------------------------------------------------------------------------

    def seats(self) -> Iterable[Range] | None:
        """(rank, samples of its first range) of all members; None while that cannot be said yet."""
        raise NotImplementedError

    def awaited(self) -> str:
        """What the opening waits for."""
        return f"the opening of epoch {self.ledger.epoch}"

    def opened(self, opening: Opening) -> None:
        """All agreed on this opening: claim this member's first numbers."""
        self.opening, self.numbers = opening, Rest(opening.span, self._done)
        self._crew = Crew(self._desk, self.ledger.epoch, opening)

    def fetch(self, size: int) -> Wait[bool]:
        """Wait for more numbers, if less than `size` is held; False when there are none for this member."""
        raise NotImplementedError

    def ask_ahead(self) -> None:
        """Ask for more before it is needed; never waits."""
        raise NotImplementedError

    def expected_batches(self) -> int:
        """How many batches this member will probably have trained on at the end of the epoch."""
        return math.ceil(self.opening.used / max(1, len(self._desk.members())) / self._batch)

    def enough(self, samples: int) -> bool:
        """Whether so many are too many on their way for now."""
        return False

    @property
    def near(self) -> bool:
        """Whether the end is so near that who takes what is still left hangs on the newest notes."""
        return False

    @property
    def reach(self) -> int:
        """The end of this member's claims from the epoch's own pool, if there is one."""
        return 0

    def first(self, members: int) -> int:
        """The samples that each of so many members has for certain: a batch, if there are enough."""
        used = self.opening.used
        return max(1, min(self._batch, used // members)) if used else 0


def key(what: str, epoch: int) -> str:
    """What an epoch's decisions and counters are called on the board."""
    return f"data/{what}/{epoch}"
