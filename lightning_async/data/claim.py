"""Samples are claimed while the epoch runs, by whoever is free: each exactly once, and all members end together.

    numbers   [ first batch of 0 | of 1 | of 2 | drawn from a counter ..................... ]
                its own without asking           chunks of ~10 s, then ever smaller, then single batches

The numbers are those of the epoch's rest (`ranges.Rest`): of all its positions, but for what an interrupted run has
done of them.

Every member has its first batch for certain (Lightning skips the validation of a rank without batches, and then the
others wait for it). A draw is under way before it is needed, so the training thread does not wait for the store, save
at the end of the epoch: who stops while there is work left must first draw a ticket of leave, and the last one is
refused. Without it, members that each count on the other would leave the rest to nobody.

What a dead member left is taken over by those still in the epoch (`sources.py`); what nobody can take is `abandoned`.
"""

from __future__ import annotations

import math

from lightning_async.data.by_ledger import LedgerShare
from lightning_async.data.crew import Desk
from lightning_async.data.opening import Opening
from lightning_async.data.pace import Pace, Worker, appetite, outlasts
from lightning_async.data.sources import Sources
from lightning_async.transport.mail import Wait

_FRAGMENTS = 32
"""No draws ahead while so many ranges are unfinished: they would not fit into the note."""


class ClaimedShare(LedgerShare):
    """One member's share of one epoch at a time, claimed by measured speed.

    Args:
        desk: The board and who is there.
        batch: This member's batch size in samples.
        drop_last: Whether incomplete batches are dropped; the end of the order that fills no batch is dropped for all.
        seconds: How much work is claimed ahead in mid-epoch.
    """

    def __init__(self, desk: Desk, *, batch: int, drop_last: bool = False, seconds: float = 10.0) -> None:
        if not seconds >= 0:
            raise ValueError(f"`seconds` must be at least 0, got {seconds}")
        super().__init__(desk, batch=batch, drop_last=drop_last, pace=Pace())
        self._seconds = seconds

    @property
    def repeated(self) -> int:
        """Samples this member took over from the dead, who may have trained on some of them."""
        return 0 if self._sources is None else self._sources.repeated

    def expected_batches(self) -> int:
        """How many batches this member will probably have trained on at the end of the epoch."""
        if self._crew is None:
            return self._equal_part()
        me, others = self._sight()
        rates = [w.rate for w in others]
        part = me.rate / (me.rate + sum(rates)) if me.rate > 0 else 1 / (1 + len(rates))
        todo = max(0, self._opening.used - self._crew.completed())
        mine = self.ledger.claimed if self._closed else self.ledger.completed + todo * part
        return math.ceil(max(mine, self.ledger.completed + self.outstanding) / self._batch)

    # ---- one epoch

    def _forget(self, epoch: int) -> None:
        super()._forget(epoch)
        self._sources: Sources | None = None

    def _offer(self) -> None:
        members = self._desk.members()
        self._propose((rank, self._first(len(members))) for rank in members)

    def _opened(self, opening: Opening) -> None:
        super()._opened(opening)
        assert self._crew is not None
        self._sources = Sources(self._desk, self.epoch, opening, self._crew)
        self.ledger.claim(*opening.first(self._desk.me))

    @property
    def _reach(self) -> int:
        return 0 if self._sources is None else self._sources.reach

    def _close(self) -> None:
        if self._sources is not None:
            self._sources.call()
        super()._close()

    # ---- claiming

    def _fetch(self, size: int) -> Wait[bool]:
        """Wait for more claims; False when there are none for this member."""
        self._look()
        assert self._sources is not None
        if self._held >= size:
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
            asked.ask(max(self._appetite(), size - self._held))
        held = self._held
        while asked.asked and self._held == held:
            yield f"the answer of the counter {asked.counter!r}"
            self._look()
        return True

    def _ask_ahead(self) -> None:
        """Have a draw under way before it is needed, if more is wanted and not better left to others."""
        if self._closed or self._sources is None or self._sources.asked() is not None:
            return
        pool = self._sources.choose()
        if pool is None or len(self.ledger.unfinished()) > _FRAGMENTS:
            return
        me, others = self._sight()
        amount = self._modest(appetite(me, self._held, self._sources.left(), others, self._seconds))
        if amount and not outlasts(me, min(amount, self._batch), self._sources.left(), others):
            pool.ask(amount)

    def _leaves(self) -> Wait[bool]:
        """Whether to end this epoch here although work is left: the others finish it sooner and one of them stays."""
        assert self._crew is not None
        assert self._sources is not None
        me, others = self._sight()
        if self._held or not outlasts(me, self._batch, self._sources.left(), others):
            return False
        counter = self._key("leave")
        self._desk.draw(counter, 1)
        while not (answers := self._desk.drawn(counter)):
            yield f"the answer of the counter {counter!r}"
        # Who left before this ticket without its note having come may not be counted on: the fastest, for all we know.
        ahead = answers[0][0]
        me, others = self._sight()
        stay = others[max(0, ahead - self._crew.gone()) :]
        return ahead < len(others) + self._crew.gone() and outlasts(me, self._batch, self._sources.left(), stay)

    def _look(self) -> None:
        """Enter the answers that came, hear the others, and let them know."""
        for first, amount in self._sources.answers() if self._sources is not None else ():
            self.ledger.claim(first, amount)
        super()._look()

    def _sight(self) -> tuple[Worker, list[Worker]]:
        assert self._crew is not None
        me = Worker(self._pace.rate, self.ledger.outstanding, self._batch)
        return me, self._crew.others(me)

    def _appetite(self) -> int:
        assert self._sources is not None
        me, others = self._sight()
        return self._modest(appetite(me, self._held, self._sources.left(), others, self._seconds))

    def _modest(self, amount: int) -> int:
        """While a speed is unknown the fair part is too: a slow member that took half of it would hold up all."""
        assert self._crew is not None
        return amount if self._crew.paced() else min(amount, self._batch)
