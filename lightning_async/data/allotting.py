"""IDPA: the samples of an epoch are allotted in parts, each so that all who live end together by what is measured now.

    numbers  |0 ....1 ....2 ....3 |0 .......1 .....2 ...3|0 .......                  |      N/A in each part
              part 1: the opening   part 2: proposed by    part 3: ...       undecided
              nominal speeds        whoever comes first to its end; the first proposal counts

    seconds a sample, measured after every batch  ->  notes  ->  whoever proposes

Parts are of whole batches: one short batch a member, and some would hold a single sample, at which BatchNorm stops.
All read the same sizes from the board, so nobody has to be told which numbers are its own. A part is proposed a moment
before it is needed, so that the training thread does not wait for the store. A member that is silent gets nothing
more; what it has stays with it. What a dead one left is drawn at the end by those still in the epoch (`crew.Estate`).
Who is dry ends its epoch: nothing is taken from a member that turns out slower than it was (`claim` is made for that).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lightning_async.data.allotment import next_part, top_up, worthwhile
from lightning_async.data.crew import Desk, Estate
from lightning_async.data.handed import Handed
from lightning_async.data.ledger import Note
from lightning_async.data.opening import Opening
from lightning_async.data.pace import Pace
from lightning_async.data.pool import Pool
from lightning_async.data.ranges import Range, cut, pack_ranges, unpack_ranges
from lightning_async.data.speeds import Speeds
from lightning_async.data.work import Work, key
from lightning_async.transport.mail import Wait

AHEAD = 1.0
"""Seconds of work left with which a member proposes the next part; of a short part, half of it."""
SILENT = 1.0
"""Seconds that a note may take; a member with work, of which nothing was heard for longer, is as slow as that."""


class Parts(Work):
    """What one member is allotted of one epoch.

    Args:
        desk: The board and who is there.
        epoch: The epoch.
        opening: As this member would open it, but for the seats.
        done: The positions that are left out.
        batch: This member's batch size in samples.
        pace: This member's speed.
        handed: What of its numbers is on its way.
        speeds: The speeds of all.
        count: In how many parts the epoch is allotted.
    """

    def __init__(
        self,
        desk: Desk,
        epoch: int,
        opening: Opening,
        *,
        done: Sequence[Range],
        batch: int,
        pace: Pace,
        handed: Handed,
        speeds: Speeds,
        count: int,
    ) -> None:
        super().__init__(desk, epoch, opening, done=done, batch=batch, pace=pace, handed=handed)
        self._speeds = speeds
        self._count = count
        self._given = self._repeated = 0
        self._number = self._proposed = 1
        self._parts: dict[int, list[Range]] = {}
        self._estates: dict[int, Estate] = {}

    @property
    def repeated(self) -> int:
        """Samples taken over from the dead."""
        return self._repeated

    def expected_batches(self) -> int:
        """How many batches this member will probably have trained on at the end of the epoch."""
        if self._crew is None:
            return super().expected_batches()
        roster = self._crew.roster
        rates = [1 / seconds for seconds in self._speeds.seconds(roster)]
        part = rates[roster.index(self._desk.me)] / sum(rates) if self._desk.me in roster else 0.0
        return math.ceil((self.ledger.claimed + self._left * part) / self._batch)

    # -- the first part ------------------------------------------------------------------------------------------------

    def seats(self) -> Iterable[Range] | None:
        """The first part; None while a nominal speed is still to come."""
        members = self._desk.members()
        if self._speeds.missing(members):
            return None
        least = self.first(len(members))
        amount = max(self._part_of(self.opening.used, given=0, members=len(members)), least * len(members))
        return self._sizes(members, amount, [0] * len(members), least=least)

    def awaited(self) -> str:
        """The opening, or whose speed it needs."""
        missing = self._speeds.missing(self._desk.members())
        return f"the nominal speeds of the members {missing}" if missing else super().awaited()

    def opened(self, opening: Opening) -> None:
        """Enter the first part."""
        super().opened(opening)
        self._enter(opening.seats)

    # -- the parts after it --------------------------------------------------------------------------------------------

    @property
    def _left(self) -> int:
        return self.opening.used - self._given

    def _enter(self, sizes: Sequence[Range]) -> None:
        """The next numbers belong to these members."""
        for rank, amount in sizes:
            self._parts.setdefault(rank, []).append((self._given, amount))
            if rank == self._desk.me:
                self.ledger.claim(self._given, amount)
            self._given += amount

    def _hear(self) -> bool:
        """Enter the next part, if it was decided."""
        value = self._desk.decided(self._part_key()) if self._left else None
        if value is not None:
            self._number += 1
            self._enter(unpack_ranges(value))
        return value is not None

    def ask_ahead(self) -> None:
        """Propose the next part before this member comes to its end."""
        if self.closed or self._crew is None or not self._left:
            return
        half = self._parts[self._desk.me][-1][1] / 2 if self._desk.me in self._parts else 0.0
        if self.held < max(2 * self._batch, min(half, AHEAD * self._pace.rate)):
            self._hear()
            self._suggest()

    def _suggest(self) -> None:
        if self._left and self._proposed <= self._number:
            self._proposed = self._number + 1
            self._desk.propose(self._part_key(), pack_ranges(self._next()))

    def _next(self) -> list[Range]:
        """The next part by what is known now: what the members still have to do counts, and how fast they are."""
        assert self._crew is not None
        self._crew.listen()
        me, live = self._desk.me, set(self._desk.live()) & set(self._desk.members())
        members = [rank for rank in self._crew.roster if rank in live or rank == me]
        amount = self._part_of(self.opening.used, given=self._given, members=len(self._crew.roster))
        return self._sizes(members, amount, [self._todo(rank) for rank in members])

    def _part_of(self, total: int, *, given: int, members: int) -> int:
        """How many samples the next part has."""
        parts = worthwhile(self._count, total, members=members, batch=self._batch)
        return next_part(given, total, parts, unit=self._batch)

    def _sizes(self, members: Sequence[int], amount: int, have: Sequence[float], *, least: int = 0) -> list[Range]:
        seconds = [max(s, self._silence(r)) for r, s in zip(members, self._speeds.seconds(members), strict=True)]
        return list(zip(members, top_up(amount, have, seconds, least=least, unit=self._batch), strict=True))

    def _todo(self, rank: int) -> float:
        """Samples that a member was given and has, by its note and its speed, not trained on yet."""
        assert self._crew is not None
        if rank == self._desk.me:
            return self.ledger.outstanding
        note, given = self._crew.note(rank), sum(amount for _, amount in self._parts.get(rank, ()))
        return max(0.0, given - note.completed - note.rate * self._crew.age(rank))

    def _silence(self, rank: int) -> float:
        """Seconds a sample that a member with work needs at least, since nothing was heard of it for so long."""
        if self._crew is None or rank == self._desk.me:
            return 0.0
        note = self._crew.note(rank)
        return (self._crew.age(rank) - SILENT) / note.batch if note.completed < note.claimed else 0.0

    def _part_key(self) -> str:
        return f"{key('part', self.ledger.epoch)}/{self._number + 1}"

    # -- more ----------------------------------------------------------------------------------------------------------

    def fetch(self, size: int) -> Wait[bool]:
        """Wait for the next part; after the last one, for what the dead left."""
        self.look()
        if self.held >= size:
            return True
        if not self._left:
            more = yield from self._inherit(size)
            return more
        self._suggest()
        if not self._hear():
            yield f"part {self._number + 1} of epoch {self.ledger.epoch}"
        return True

    def _inherit(self, size: int) -> Wait[bool]:
        """Draw from what the dead left; False when there is nothing."""
        pools = self._pools()
        if any(pool.asked for pool in pools):
            yield "the answer of a counter"
        elif any(estate.pool is None for estate in self._estates.values()):
            yield f"what the members that died in epoch {self.ledger.epoch} left"
        elif (pool := next((pool for pool in pools if not pool.spent), None)) is not None:
            pool.ask(max(self._batch, size - self.held))
        else:
            return False
        return True

    def _pools(self) -> list[Pool]:
        """What each dead member left, as far as that is agreed on."""
        assert self._crew is not None
        for rank in self._crew.dead() if not self._left else ():
            estate = self._estates.setdefault(rank, Estate(self._desk, f"data/left/{self.ledger.epoch}/{rank}"))
            estate.settle(self._last_word(rank))
        return [estate.pool for _, estate in sorted(self._estates.items()) if estate.pool is not None]

    def _last_word(self, rank: int) -> Note:
        """What a dead member had not completed: of its parts, which all know, and of what it had drawn after them."""
        assert self._crew is not None
        note, parts = self._crew.note(rank), self._parts.get(rank, [])
        open_parts = sum(amount for _, amount in parts) - note.completed
        drawn = cut(note.unfinished, max(0, open_parts), note.claimed)
        own = cut(parts, note.completed, max(0, open_parts))
        told_all = note.claimed - note.completed >= open_parts
        return Note(note.epoch, note.batch, unfinished=(*own, *(drawn if told_all else ())))

    def look(self) -> None:
        """Enter what was drawn, hear the others, and let them know."""
        for pool in [e.pool for e in self._estates.values() if e.pool is not None]:
            for first, amount in pool.answers():
                self.ledger.claim(first, amount)
                self._repeated += amount
        super().look()
