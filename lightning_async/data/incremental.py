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
from collections.abc import Callable, Sequence

import torch

from lightning_async.data.allotment import next_part, top_up, worthwhile
from lightning_async.data.balance import Incremental
from lightning_async.data.by_ledger import LedgerShare
from lightning_async.data.crew import Desk, Estate
from lightning_async.data.ledger import Note
from lightning_async.data.opening import Opening
from lightning_async.data.pool import Pool
from lightning_async.data.ranges import Range, cut, pack_ranges, unpack_ranges
from lightning_async.data.speeds import MeanPace, Speeds
from lightning_async.transport.mail import Wait

AHEAD = 1.0
"""Seconds of work left with which a member proposes the next part; of a short part, half of it."""
SILENT = 1.0
"""Seconds that a note may take; a member with work, of which nothing was heard for longer, is as slow as that."""


class IncrementalShare(LedgerShare):
    """One member's share of one epoch at a time, allotted in parts.

    Args:
        desk: The board and who is there.
        knobs: How many parts, and what they go by.
        batch: This member's batch size in samples.
        drop_last: Whether incomplete batches are dropped.
        probe: Measures this member's nominal speed.
    """

    def __init__(
        self,
        desk: Desk,
        knobs: Incremental,
        *,
        batch: int,
        drop_last: bool = False,
        probe: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(desk, batch=batch, drop_last=drop_last, pace=MeanPace(knobs.memory))
        self._knobs = knobs
        self._speeds = Speeds(desk, knobs.nominal, probe)

    def expected_batches(self) -> int:
        """How many batches this member will probably have trained on at the end of the epoch."""
        if self._crew is None:
            return self._equal_part()
        left = self._opening.used - self._given if not self._closed else 0
        roster = self._crew.roster
        rates = [1 / seconds for seconds in self._speeds.seconds(roster)]
        part = rates[roster.index(self._desk.me)] / sum(rates) if self._desk.me in roster else 0.0
        return math.ceil((self.ledger.claimed + left * part) / self._batch)

    def memory(self) -> dict[str, torch.Tensor]:
        """The speeds."""
        return {"speeds": self._speeds.memory()}

    def recall(self, memory: dict[str, torch.Tensor]) -> None:
        """Begin with the speeds that an earlier run measured."""
        if "speeds" in memory:
            self._speeds.recall(memory["speeds"])

    # ---- the first part

    def _forget(self, epoch: int) -> None:
        super()._forget(epoch)
        self._given = 0
        self._number = self._proposed = 1
        self._parts: dict[int, list[Range]] = {}
        self._estates: dict[int, Estate] = {}
        self.repeated = 0

    def _offer(self) -> None:
        members, used = self._desk.members(), self._opening.used
        if self._speeds.missing(members):
            return
        least = self._first(len(members))
        amount = max(self._part_of(used, given=0, members=len(members)), least * len(members))
        self._propose(self._sizes(members, amount, [0] * len(members), least=least))

    def _opened(self, opening: Opening) -> None:
        super()._opened(opening)
        self._enter(opening.seats)

    def _open(self) -> Wait[None]:
        while self._crew is None and (missing := self._speeds.missing(self._desk.members())):
            yield f"the nominal speeds of the members {missing}"
        yield from super()._open()

    # ---- the parts after it

    @property
    def _left(self) -> int:
        return self._opening.used - self._given

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

    def _ask_ahead(self) -> None:
        """Propose the next part before this member comes to its end."""
        if self._closed or self._crew is None or not self._left:
            return
        half = self._parts[self._desk.me][-1][1] / 2 if self._desk.me in self._parts else 0.0
        if self._held < max(2 * self._batch, min(half, AHEAD * self._pace.rate)):
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
        amount = self._part_of(self._opening.used, given=self._given, members=len(self._crew.roster))
        return self._sizes(members, amount, [self._todo(rank) for rank in members])

    def _part_of(self, total: int, *, given: int, members: int) -> int:
        """How many samples the next part has."""
        parts = worthwhile(self._knobs.parts, total, members=members, batch=self._batch)
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
        return f"{self._key('part')}/{self._number + 1}"

    # ---- more

    def _fetch(self, size: int) -> Wait[bool]:
        """Wait for the next part; after the last one, for what the dead left."""
        self._look()
        if self._held >= size:
            return True
        if not self._left:
            more = yield from self._inherit(size)
            return more
        self._suggest()
        if not self._hear():
            yield f"part {self._number + 1} of epoch {self.epoch}"
        return True

    def _inherit(self, size: int) -> Wait[bool]:
        """Draw from what the dead left; False when there is nothing."""
        pools = self._pools()
        if any(pool.asked for pool in pools):
            yield "the answer of a counter"
        elif any(estate.pool is None for estate in self._estates.values()):
            yield f"what the members that died in epoch {self.epoch} left"
        elif (pool := next((pool for pool in pools if not pool.spent), None)) is not None:
            pool.ask(max(self._batch, size - self._held))
        else:
            return False
        return True

    def _pools(self) -> list[Pool]:
        """What each dead member left, as far as that is agreed on."""
        assert self._crew is not None
        for rank in self._crew.dead() if not self._left else ():
            estate = self._estates.setdefault(rank, Estate(self._desk, f"data/left/{self.epoch}/{rank}"))
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

    def _look(self) -> None:
        """Enter what was drawn, hear the others, and let them know."""
        for pool in [e.pool for e in self._estates.values() if e.pool is not None]:
            for first, amount in pool.answers():
                self.ledger.claim(first, amount)
                self.repeated += amount
        super()._look()
