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

from lightning_async.data.ledger import Note, pack_ranges, unpack_ranges
from lightning_async.data.pace import Worker
from lightning_async.data.pool import Opening, Pool
from lightning_async.transport.mail import Board


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
        self.roster = tuple(rank for rank, _ in opening.seats)

    def listen(self) -> None:
        """Note when each note was first seen; its age is counted from there."""
        for rank, raw in self._desk.notes().items():
            if rank not in self._heard or self._heard[rank][0] != raw:
                self._heard[rank] = (raw, self._desk.now())

    def note(self, rank: int) -> Note:
        """The newest word of `rank` about this epoch; before its first one it has its first range and nothing else."""
        raw, _ = self._heard.get(rank, (b"", 0.0))
        first = self._opening.first(rank)
        fresh = Note(self._epoch, max(1, first[1]), claimed=first[1], unfinished=(first,) if first[1] else ())
        note = Note.unpack(raw) if raw else fresh
        if note.epoch == self._epoch:
            return note
        return replace(fresh, batch=note.batch, rate=note.rate, closed=note.epoch > self._epoch)

    def others(self, fallback: Worker) -> list[Worker]:
        """The others that can be counted on, fastest first; who never told its speed counts as fast as this one."""
        live = [r for r in self._present() if r in self._desk.live() and not self.note(r).closed]
        return sorted((self._worker(r, fallback) for r in live), key=lambda w: -w.rate)

    def gone(self) -> int:
        """How many of the others are known to take nothing more."""
        return sum(self.note(r).closed for r in self._present())

    def dead(self) -> list[int]:
        """Members of this epoch that were declared dead."""
        members = self._desk.members()
        return [r for r in self.roster if r not in members]

    def completed(self) -> int:
        """Samples completed in this epoch as far as the notes tell, repeated ones counted once."""
        return sum(self.note(r).completed for r in self.roster)

    def claimed(self) -> int:
        """Samples claimed in this epoch as far as the notes tell."""
        return sum(self.note(r).claimed for r in self.roster)

    def _present(self) -> list[int]:
        members = self._desk.members()
        return [r for r in self.roster if r in members and r != self._desk.me]

    def _worker(self, rank: int, fallback: Worker) -> Worker:
        note = self.note(rank)
        rate = note.rate or fallback.rate
        age = self._desk.now() - self._heard[rank][1] if rank in self._heard else 0.0
        return Worker(rate, max(0.0, note.claimed - note.completed - rate * age), note.batch)


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
        self.pool: Pool | None = None

    def settle(self, note: Note) -> Pool | None:
        """Propose the last note's unfinished ranges; the pool of what was decided, None while that is not known."""
        if not self._proposed:
            self._board.propose(self._key, pack_ranges(note.unfinished))
            self._proposed = True
        if self.pool is None and (value := self._board.decided(self._key)) is not None:
            self.pool = Pool(self._board, f"{self._key}/draw", unpack_ranges(value))
        return self.pool
