"""Samples are claimed while the epoch runs, by whoever is free: each exactly once, and all members end together.

    numbers   [ first batch of 0 | of 1 | of 2 | drawn from a counter ..................... ]
                its own without asking           chunks of ~10 s, then ever smaller, then single batches

The numbers are those of the epoch's rest (`ranges.Rest`): of all its positions, but for what an interrupted run has
done of them. Ledgers, notes and tickets go by numbers; what is handed out, and what is said to be done, are positions.

Every member has its first batch for certain (Lightning skips the validation of a rank without batches, and then the
others wait for it). A draw is under way before it is needed, so the training thread does not wait for the store, save
at the end of the epoch: who stops while there is work left must first draw a ticket of leave, and the last one is
refused. Without it, members that each count on the other would leave the rest to nobody.

What a dead member left is taken over by those still in the epoch (`sources.py`); what nobody can take is `abandoned`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lightning_async.data.crew import Crew, Desk
from lightning_async.data.handed import Handed
from lightning_async.data.ledger import Ledger, Note
from lightning_async.data.opening import Opening, refuse_other_order, refuse_second_order, stamp, usable
from lightning_async.data.pace import Pace, Worker, appetite, outlasts
from lightning_async.data.ranges import Range, Rest, each, joined
from lightning_async.data.sources import Sources
from lightning_async.transport.mail import Wait

_FRAGMENTS = 32
"""No draws ahead while so many ranges are unfinished: they would not fit into the note."""


class ClaimedShare:
    """One member's share of one epoch at a time, claimed by measured speed.

    Args:
        desk: The board and who is there.
        batch: This member's batch size in samples.
        drop_last: Whether incomplete batches are dropped; the end of the order that fills no batch is dropped for all.
        seconds: How much work is claimed ahead in mid-epoch.
    """

    def __init__(self, desk: Desk, *, batch: int, drop_last: bool = False, seconds: float = 10.0) -> None:
        if batch < 1:
            raise ValueError(f"`batch` must be at least 1, got {batch}")
        if not seconds >= 0:
            raise ValueError(f"`seconds` must be at least 0, got {seconds}")
        self._desk = desk
        self._batch = batch
        self._drop_last = drop_last
        self._seconds = seconds
        self._pace = Pace()
        self._order = (0, 0)
        self._done: tuple[Range, ...] = ()
        self._opening = Opening(0, 0, 0, 0)
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
    def repeated(self) -> int:
        """Samples this member took over from the dead, who may have trained on some of them."""
        return 0 if self._sources is None else self._sources.repeated

    @property
    def rate(self) -> float:
        """This member's own speed in samples per second, 0 while unknown."""
        return self._pace.rate

    @property
    def dry(self) -> bool:
        """Whether this member takes no more work in this epoch and has trained on all it took."""
        return self._closed and not self.outstanding

    def begin_epoch(
        self, epoch: int, *, total: int, digest: int = 0, done: Sequence[Range] = (), limit: int | None = None
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
        first = max(1, min(self._batch, used // len(members))) if used else 0
        self._opening = Opening(total, span, used, stamp(digest, done), tuple((rank, first) for rank in members))
        self._desk.propose(self._key("open"), self._opening.pack())

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
        self._draw_ahead()
        return samples

    def done(self) -> list[Range]:
        """The positions that this member completed since the epoch was opened."""
        return joined(self._positions(self.ledger.done()))

    def expected_batches(self) -> int:
        """How many batches this member will probably have trained on at the end of the epoch."""
        if self._crew is None:
            return math.ceil(self._opening.used / max(1, len(self._desk.members())) / self._batch)
        me, others = self._sight()
        rates = [w.rate for w in others]
        part = me.rate / (me.rate + sum(rates)) if me.rate > 0 else 1 / (1 + len(rates))
        todo = max(0, self._opening.used - self._crew.completed())
        mine = self.ledger.claimed if self._closed else self.ledger.completed + todo * part
        return math.ceil(max(mine, self.ledger.completed + self.outstanding) / self._batch)

    def abandoned(self) -> int:
        """Samples of the epoch that nobody trained on, by all notes; too many as long as not `settled`.

        Nothing is left over while nobody died: the last member may not leave before all is taken.
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

    # ---- one epoch

    def _forget(self, epoch: int) -> None:
        self.ledger = Ledger(epoch)
        self.dropped = 0
        self._handed = Handed()
        self._closed = False
        self._rest = Rest(0)
        self._crew: Crew | None = None
        self._sources: Sources | None = None

    def _usable(self, left: int, members: int, *, resumed: bool) -> int:
        """How many of the numbers are handed out."""
        unit = self._batch if self._drop_last else 1
        if resumed or left >= members * unit:
            return usable(left, members=members, unit=unit)
        if not self._drop_last:
            raise ValueError(f"{left} samples cannot be shared by {members} members: each needs at least one")
        return 0

    def _positions(self, numbers: Iterable[Range]) -> list[Range]:
        return [part for first, amount in numbers for part in self._rest.positions(first, amount)]

    def _key(self, what: str) -> str:
        return f"data/{what}/{self.epoch}"

    def _open(self) -> Wait[None]:
        """Learn what was decided about this epoch and take the first batch."""
        while self._sources is None:
            value = self._desk.decided(self._key("open"))
            if value is None:
                yield f"the opening of epoch {self.epoch}"
                continue
            opening = Opening.unpack(value)
            refuse_other_order(self.epoch, self._opening, opening)
            self._opening, self._rest = opening, Rest(opening.span, self._done)
            self._crew = Crew(self._desk, self.epoch, opening)
            self._sources = Sources(self._desk, self.epoch, opening, self._crew)
            self.ledger.claim(*opening.first(self._desk.me))
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
        self._draw_ahead()
        return batch

    def _close(self) -> None:
        self._closed = True
        if self._sources is not None:
            self._sources.call()
        self._look()

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

    def _draw_ahead(self) -> None:
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
        if self._crew is None or self._sources is None:
            return
        for first, amount in self._sources.answers():
            self.ledger.claim(first, amount)
        open_ranges, rate = tuple(self.ledger.unfinished()), self._pace.rate
        done, claimed = self.ledger.completed, self.ledger.claimed
        note = Note(self.epoch, self._batch, rate, self._closed, done, claimed, self._sources.reach, open_ranges)
        self._desk.publish(note.pack())
        self._crew.listen()

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
