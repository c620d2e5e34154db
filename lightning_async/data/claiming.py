"""One epoch's claims of one member: drawn before they are needed, ever smaller, and not by one whom the others outrun.

    a speed unknown, enough on its way -----------------> no batch for the workers' queues, no draw ahead
    held enough ----------------------------------------> no draw
    held little, work left:  others finish it sooner ---> a ticket of leave; the last one is refused
                             else ----------------------> draw `appetite` numbers of a pool (`sources.py`)

A draw is under way before it is needed, so the training thread does not wait for the store, save at the end of the
epoch: who stops while there is work left must first draw a ticket of leave, and the last one is refused. Without it,
members that each count on the other would leave the rest to nobody. While a speed is unknown nobody leaves: a fast
member that takes a slow one for as fast as itself would leave it the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lightning_async.data.crew import Desk
from lightning_async.data.handed import Handed
from lightning_async.data.opening import Opening
from lightning_async.data.pace import Pace, Worker, appetite, outlasts
from lightning_async.data.ranges import Range
from lightning_async.data.sources import Sources
from lightning_async.data.work import Work, key
from lightning_async.transport.mail import Wait

LAG, NEAR = 1.0, 4
"""The end is near: so many seconds (a note is that old at most) and so many batches of the slowest before it."""
DARK = 8
"""While speeds are unknown a member holds at most what would be the part of one so many times slower than all."""
_FRAGMENTS = 32
"""No draws ahead while so many ranges are unfinished: they would not fit into the note."""


class Claims(Work):
    """What one member claims of one epoch.

    Args:
        desk: The board and who is there.
        epoch: The epoch.
        opening: As this member would open it, but for the seats.
        done: The positions that are left out.
        batch: This member's batch size in samples.
        seconds: How much work is claimed ahead in mid-epoch.
        pace: This member's speed.
        handed: What of its claims is on its way.
    """

    def __init__(
        self,
        desk: Desk,
        epoch: int,
        opening: Opening,
        *,
        done: Sequence[Range],
        batch: int,
        seconds: float,
        pace: Pace,
        handed: Handed,
    ) -> None:
        super().__init__(desk, epoch, opening, done=done, batch=batch, pace=pace, handed=handed)
        self._seconds = seconds
        self._sources: Sources | None = None
        self._near = False

    @property
    def repeated(self) -> int:
        """Samples taken over from the dead."""
        return 0 if self._sources is None else self._sources.repeated

    @property
    def reach(self) -> int:
        """The end of what was drawn from the epoch's own pool."""
        return 0 if self._sources is None else self._sources.reach

    @property
    def near(self) -> bool:
        """As it was at the last batch."""
        return self._near

    def seats(self) -> Iterable[Range]:
        """A batch for each."""
        members = self._desk.members()
        return [(rank, self.first(len(members))) for rank in members]

    def opened(self, opening: Opening) -> None:
        """Take the first batch."""
        super().opened(opening)
        assert self._crew is not None  # the epoch is open
        self._sources = Sources(self._desk, self.ledger.epoch, opening, self._crew)
        self.ledger.claim(*opening.first(self._desk.me))

    def fetch(self, size: int) -> Wait[bool]:
        """Wait for more claims, if less than `size` is held; False when there are none for this member."""
        self.look()
        assert self._sources is not None  # the epoch is open
        if self.held >= size:
            return True
        asked = self._sources.asked()
        if asked is None:
            asked = self._sources.choose()
            if asked is None:
                exhausted = yield from self._sources.exhausted()
                return not exhausted
            leaves = yield from self._leaves()
            if leaves:
                return False
            asked.ask(max(self._appetite(), size - self.held))
        held = self.held
        while asked.asked and self.held == held:
            yield f"the answer of the counter {asked.counter!r}"
            self.look()
        return True

    def ask_ahead(self) -> None:
        """Have a draw under way before it is needed, if more is wanted and not better left to others."""
        if self.closed or self._sources is None or self._sources.asked() is not None:
            return
        pool = self._sources.choose()
        if pool is None or len(self.ledger.unfinished()) > _FRAGMENTS:
            return
        if self.enough(self._handed.outstanding + self._batch):
            return
        me, others = self._sight()
        self._near = self._is_near([me, *others])
        amount = self._modest(appetite(me, self.held, self._sources.left(), others, self._seconds))
        if amount and not outlasts(me, min(amount, self._batch), self._sources.left(), others):
            pool.ask(amount)

    def close(self) -> None:
        """Take nothing more in this epoch."""
        if self._sources is not None:
            self._sources.call()
        super().close()

    def look(self) -> None:
        """Enter the answers that came, hear the others, and let them know."""
        for first, amount in self._sources.answers() if self._sources is not None else ():
            self.ledger.claim(first, amount)
        super().look()

    def expected_batches(self) -> int:
        """How many batches this member will probably have trained on at the end of the epoch."""
        if self._crew is None:
            return super().expected_batches()
        me, others = self._sight()
        rates = [w.rate for w in others]
        part = me.rate / (me.rate + sum(rates)) if me.rate > 0 else 1 / (1 + len(rates))
        todo = max(0, self.opening.used - self._crew.completed())
        mine = self.ledger.claimed if self.closed else self.ledger.completed + todo * part
        return math.ceil(max(mine, self.ledger.completed + self._handed.outstanding) / self._batch)

    def enough(self, samples: int) -> bool:
        """In the dark, whether they are more than a member may hold that turns out to be slow."""
        return self._dark and samples > self.opening.used / (DARK * len(self._desk.members()))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _leaves(self) -> Wait[bool]:
        """Whether to end this epoch here although work is left: the others finish it sooner and one of them stays."""
        assert self._crew is not None  # the epoch is open
        assert self._sources is not None
        me, others = self._sight()
        if self._dark or self.held or not outlasts(me, self._batch, self._sources.left(), others):
            return False
        counter = key("leave", self.ledger.epoch)
        self._desk.draw(counter, 1)
        while not (answers := self._desk.drawn(counter)):
            yield f"the answer of the counter {counter!r}"
        # Who left before this ticket without its note having come may not be counted on: the fastest, for all we know.
        ahead = answers[0][0]
        me, others = self._sight()
        stay = others[max(0, ahead - self._crew.gone()) :]
        return ahead < len(others) + self._crew.gone() and outlasts(me, self._batch, self._sources.left(), stay)

    def _sight(self) -> tuple[Worker, list[Worker]]:
        assert self._crew is not None
        me = Worker(self._pace.rate, self.ledger.outstanding, self._batch)
        return me, self._crew.others(me, 0 if self._sources is None else self._sources.unseen())

    def _is_near(self, workers: Sequence[Worker]) -> bool:
        assert self._crew is not None
        rates = [w.rate for w in workers if w.rate > 0]
        slowest = max((w.batch / w.rate for w in workers if w.rate > 0), default=0.0)
        return self.opening.used - self._crew.completed() <= (LAG + NEAR * slowest) * sum(rates)

    def _appetite(self) -> int:
        assert self._sources is not None
        me, others = self._sight()
        return self._modest(appetite(me, self.held, self._sources.left(), others, self._seconds))

    def _modest(self, amount: int) -> int:
        """While a speed is unknown the fair part is too: a slow member that took half of it would hold up all."""
        return min(amount, self._batch) if self._dark else amount

    @property
    def _dark(self) -> bool:
        """Whether it is not known yet who is slower than whom. Nobody leaves then: the others may not be faster."""
        assert self._crew is not None
        return self._crew.accompanied() and (self._pace.rate <= 0 or not self._crew.paced())
