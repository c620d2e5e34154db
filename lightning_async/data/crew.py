"""The other members as one member sees them: by their newest notes, carried forward to now at their own speeds.

    roster (decided at the opening)   0  1  2  3
    board.members()                   0  1     3      -> 2 is dead: what it left is agreed on by `proposal first wins`
    board.live()                      0  1            -> 3 is frozen or cut off: nobody counts on it, nobody replaces it

A dead member's unfinished ranges are read from its last note; each member may know another one as its last, so the
first list proposed is the one that counts (`Estate`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from lightning_async.data.ledger import Note
from lightning_async.data.opening import Opening
from lightning_async.data.pace import Worker
from lightning_async.data.pool import Pool
from lightning_async.data.ranges import pack_ranges, unpack_ranges
from lightning_async.transport.mail import Board

UNDER_WAY = 0.02
"""Seconds for which a note was under way, on average near the end of an epoch: half of the time between two of them."""


class Desk(Board, Protocol):
    """The part of a carrier that the data need: the board and who is there."""

    @property
    def me(self) -> int:
        """This member's rank."""

    def members(self) -> tuple[int, ...]:
        """The ranks not declared dead."""

    def live(self) -> tuple[int, ...]:
        """The members heard of lately."""

    def now(self) -> float:
        """Seconds on this member's clock."""


class Crew:
    """All members of one epoch, this one included, through their notes.

    Args:
        desk: The board and who is there.
        epoch: The epoch.
        opening: Its opening.
    """

    def __init__(self, desk: Desk, epoch: int, opening: Opening) -> None:
        self._desk = desk
        self._epoch = epoch
        self._opening = opening
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._notes: dict[int, Note] = {}
        self._begun = desk.now()
        self.roster = tuple(rank for rank, _ in opening.seats)

    def listen(self) -> None:
        """Note when each note was first seen; its age is counted from there."""
        for rank, raw in self._desk.notes().items():
            if rank not in self._heard or self._heard[rank][0] != raw:
                self._heard[rank] = (raw, self._desk.now())
                self._notes[rank] = self._read(rank, Note.unpack(raw))

    def note(self, rank: int) -> Note:
        """The newest word of `rank` about this epoch; before its first one it has its first range and nothing else."""
        if rank not in self._notes:
            self._notes[rank] = self._unwritten(rank)
        return self._notes[rank]

    def age(self, rank: int) -> float:
        """Seconds since the newest word of `rank` was first seen, or since the epoch opened."""
        return self._desk.now() - (self._heard[rank][1] if rank in self._heard else self._begun)

    def others(self, fallback: Worker, unseen: float = 0.0) -> list[Worker]:
        """The others that can be counted on, fastest first; who never told its speed counts as fast as this one.

        What they claimed after their notes, `unseen`, is with them by their speeds.
        """
        live, now = set(self._desk.live()), self._desk.now()
        counted = [r for r in self._present() if r in live and not self.note(r).closed]
        rates = sum(self.note(r).rate or fallback.rate for r in counted)
        each = unseen / rates if rates else 0.0
        return sorted((self._worker(r, fallback, now, each) for r in counted), key=lambda w: -w.rate)

    def paced(self) -> bool:
        """Whether all of the others have told their speeds, or that they are through."""
        return all(self.note(r).rate > 0 or self.note(r).closed for r in self._present())

    def accompanied(self) -> bool:
        """Whether anybody else is in this epoch."""
        return bool(self._present())

    def gone(self) -> int:
        """How many of the others are known to take nothing more."""
        return sum(self.note(r).closed for r in self._present())

    def ended(self) -> bool:
        """Whether all others are known to have trained on all they will train on."""
        notes = [self.note(r) for r in self._present()]
        return all(n.epoch > self._epoch or (n.closed and n.completed == n.claimed) for n in notes)

    def dead(self) -> list[int]:
        """Members of this epoch that were declared dead."""
        members = set(self._desk.members())
        return [r for r in self.roster if r not in members]

    def completed(self) -> int:
        """Samples completed in this epoch as far as the notes tell, repeated ones counted once."""
        return sum(self.note(r).completed for r in self.roster)

    def claimed(self, but: int | None = None) -> int:
        """Samples claimed in this epoch as far as the notes tell, but for those of one member."""
        return sum(self.note(r).claimed for r in self.roster if r != but)

    def _read(self, rank: int, note: Note) -> Note:
        """The note as one of this epoch: of another epoch's only the speed is of use."""
        if note.epoch == self._epoch:
            return note
        closed = note.epoch > self._epoch
        return replace(self._unwritten(rank), batch=note.batch, rate=note.rate, closed=closed)

    def _unwritten(self, rank: int) -> Note:
        first = self._opening.first(rank)
        return Note(self._epoch, max(1, first[1]), claimed=first[1], unfinished=(first,) if first[1] else ())

    def _present(self) -> list[int]:
        members = set(self._desk.members()) - {self._desk.me}
        return [r for r in self.roster if r in members]

    def _worker(self, rank: int, fallback: Worker, now: float, unseen: float) -> Worker:
        """As it is by now; with less than nothing to do it has claimed a batch since that nobody has heard of."""
        note = self.note(rank)
        rate = note.rate or fallback.rate
        age = UNDER_WAY + now - self._heard[rank][1] if rank in self._heard else 0.0
        return Worker(rate, max(-note.batch, note.claimed - note.completed + rate * (unseen - age)), note.batch)


class Estate:
    """What one dead member left unfinished, once all agree on what that is.

    Args:
        board: Where it is agreed on.
        key: The name of the decision, and of the counter that gives the samples out.
    """

    def __init__(self, board: Board, key: str) -> None:
        self._board = board
        self._key = key
        self._proposed = False
        self.reach = 0
        self.pool: Pool | None = None

    def settle(self, note: Note) -> Pool | None:
        """Propose the last note's unfinished ranges; the pool of what was decided, None while that is not known."""
        if not self._proposed:
            self._board.propose(self._key, pack_ranges([(note.reach, 0), *note.unfinished]))
            self._proposed = True
        if self.pool is None and (value := self._board.decided(self._key)) is not None:
            (self.reach, _), *ranges = unpack_ranges(value)
            self.pool = Pool(self._board, f"{self._key}/draw", ranges)
        return self.pool
