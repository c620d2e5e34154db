"""Where one epoch's work comes from: the epoch's own pool, and what the dead leave.

    1. estates   the unfinished ranges of each dead member's last note                 repeated in part, perhaps
    2. lost      what a dead member had drawn after its last note: nobody's claims     known when all living have called
    3. main      the epoch's own counter

A member that will draw no more from the main pool says once and for all what it drew there (its call). When somebody
has died, those who come to their end wait for the calls of the others that are alive; the others wait for them at the
meeting anyway. What then is nobody's, past all that the dead had told of, is lost and is drawn like an estate. With
several dead in one epoch, what lies before the furthest word of a dead member cannot be told from what another one had
completed: it is left out, and counted as abandoned. So is what is lost when no one is left in the epoch to take it.
"""

from __future__ import annotations

from lightning_async.data.crew import Crew, Desk, Estate
from lightning_async.data.ledger import Ledger
from lightning_async.data.opening import Opening
from lightning_async.data.pool import Pool
from lightning_async.data.ranges import Range, pack_ranges, uncovered, unpack_ranges
from lightning_async.transport.mail import Wait


class Sources:
    """The pools of one epoch, as one member draws from them.

    Args:
        desk: The board and who is there.
        epoch: The epoch.
        opening: Its opening.
        crew: Its members.
    """

    def __init__(self, desk: Desk, epoch: int, opening: Opening, crew: Crew) -> None:
        self._desk = desk
        self._epoch = epoch
        self._opening = opening
        self._crew = crew
        self._rest: Range = (opening.reserved, opening.used - opening.reserved)
        self._main = Pool(desk, f"data/draw/{epoch}", [self._rest])
        self._mine = Ledger(epoch)
        self._estates: dict[int, Estate] = {}
        self._lost: Pool | None = None
        self._called = False
        self.repeated = 0

    @property
    def reach(self) -> int:
        """The end of what this member drew from the main pool."""
        return sum(self._mine.claims[-1]) if self._mine.claims else 0

    def answers(self) -> list[Range]:
        """The ranges of this member's draws that were answered since the last call."""
        found = []
        for pool in self._pools():
            ranges = pool.answers()
            found += ranges
            for first, amount in ranges if pool is self._main else ():
                self._mine.claim(first, amount)
            self.repeated += sum(n for _, n in ranges) if pool not in (self._main, self._lost) else 0
        if self._main.spent:
            self.call()
        return found

    def asked(self) -> Pool | None:
        """The pool that owes an answer."""
        return next((pool for pool in self._pools() if pool.asked), None)

    def choose(self) -> Pool | None:
        """The pool to draw from next; None while none is known to have anything left."""
        for rank in self._crew.dead():
            estate = self._estates.setdefault(rank, Estate(self._desk, f"data/left/{self._epoch}/{rank}"))
            estate.settle(self._crew.note(rank))
        return next((pool for pool in self._pools() if not pool.spent), None)

    def left(self) -> int:
        """Samples that nobody is known to have claimed."""
        claimed = self._crew.claimed() - self._opening.reserved - self.repeated
        main = min(self._main.left, self._main.size - claimed - self._main.asked)
        return max(0, main) + sum(pool.left for pool in self._pools() if pool is not self._main)

    def unseen(self) -> int:
        """Samples that others are known to have claimed, by a later ticket of this member's, but not by their notes."""
        others = self._crew.claimed(but=self._desk.me) - self._opening.reserved + self._opening.first(self._desk.me)[1]
        return max(0, self._main.frontier - self._mine.claimed - others)

    def call(self) -> None:
        """Tell all, once, what this member drew from the main pool: it draws nothing more from there."""
        if not self._called and not self._main.asked:
            self._called = True
            self._desk.propose(self._roll(self._desk.me), pack_ranges(self._mine.claims))

    def exhausted(self) -> Wait[bool]:
        """Whether there is nothing more, when `choose` finds nothing; waits for what is not agreed on yet."""
        if any(estate.pool is None for estate in self._estates.values()):
            yield f"what the members that died in epoch {self._epoch} left"
            return False
        if not self._estates or self._lost is not None:
            return True
        missing = [rank for rank in self._living() if self._desk.decided(self._roll(rank)) is None]
        if not missing:
            yield from self._find_lost()
            return False
        if not set(missing) & set(self._desk.live()):
            return True
        yield f"the claims of the members {missing} in epoch {self._epoch}"
        return False

    def _find_lost(self) -> Wait[None]:
        key = f"data/lost/{self._epoch}"
        self._desk.propose(key, pack_ranges(self._unclaimed()))
        while (value := self._desk.decided(key)) is None:
            yield f"what was lost in epoch {self._epoch}"
        self._lost = Pool(self._desk, f"{key}/draw", unpack_ranges(value))

    def _unclaimed(self) -> list[Range]:
        """The positions past all that the dead had told of, and claimed by nobody."""
        calls = {rank: self._desk.decided(self._roll(rank)) for rank in (*self._living(), *self._estates)}
        begin = max([self._rest[0], *(e.reach for r, e in self._estates.items() if calls[r] is None)])
        claims = [pair for value in calls.values() if value is not None for pair in unpack_ranges(value)]
        end = sum(self._rest)
        return uncovered([*claims, *self._mine.claims], begin, end) if None in calls.values() else []

    def _living(self) -> list[int]:
        return [rank for rank in self._desk.members() if rank != self._desk.me]

    def _roll(self, rank: int) -> str:
        return f"data/drawn/{self._epoch}/{rank}"

    def _pools(self) -> list[Pool]:
        left = [estate.pool for _, estate in sorted(self._estates.items()) if estate.pool is not None]
        return [*left, *([] if self._lost is None else [self._lost]), self._main]
