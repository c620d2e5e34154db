"""Samples are claimed while the epoch runs, by whoever is free: each exactly once, and all members end together.

    positions   [ first batch of 0 | of 1 | of 2 | drawn from a counter ..................... ]
                  its own without asking           chunks of ~10 s, then ever smaller, then single batches

Every member has its first batch for certain (Lightning skips the validation of a rank without batches, and then the
others wait for it). A draw is under way before it is needed, so the training thread does not wait for the store, save
once at the end of the epoch: who stops while there is work left must first draw a ticket of leave, and the last one is
refused. Without it, members that each count on the other would leave the rest to nobody.

What a dead member left (by its last note) is drawn through a counter of its own by those still in the epoch, before
anything else. Two things are beyond this and are counted by `abandoned`: what it had drawn since that note, and what it
left when all others had already ended the epoch.
"""

from __future__ import annotations

import math

from lightning_async.data.crew import Crew, Desk, Estate
from lightning_async.data.equal import refuse_other_order
from lightning_async.data.handed import Handed
from lightning_async.data.ledger import Ledger, Note
from lightning_async.data.pace import Pace, Worker, appetite, outlasts
from lightning_async.data.pool import Opening, Pool
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
        self._total = self._digest = 0
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

    def begin_epoch(self, epoch: int, *, total: int, digest: int = 0) -> None:
        """Open `epoch` over `total` positions of an order with this fingerprint; the one under way is left as it is."""
        if epoch == self.epoch:
            return
        members = self._desk.members()
        if total < len(members):
            raise ValueError(f"{total} samples cannot be shared by {len(members)} members: each needs at least one")
        self._forget(epoch)
        self._total, self._digest = total, digest
        used = total - total % self._batch if self._drop_last else total
        first = max(1, min(self._batch, used // len(members))) if used else 0
        opening = Opening(total, used, digest, tuple((rank, first) for rank in members))
        self._desk.propose(self._key("open"), opening.pack())

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

    def completed(self, samples: int | None = None) -> None:
        """Count the oldest batch handed out, or so many samples, as trained on."""
        samples = self._handed.trained(samples)
        self.ledger.complete(samples)
        self._pace.completed(samples, self._desk.now())
        self._look()
        if self._closed and not self.outstanding:
            self._pace.stop()
        self._draw_ahead()

    def expected_batches(self) -> int:
        """How many batches this member will probably have trained on at the end of the epoch."""
        if self._crew is None or self._main is None:
            return math.ceil(self._total / max(1, len(self._desk.members())) / self._batch)
        me, others = self._sight()
        rates = [w.rate for w in others]
        part = me.rate / (me.rate + sum(rates)) if me.rate > 0 else 1 / (1 + len(rates))
        todo = max(0, self._opening.used - self._crew.completed())
        mine = self.ledger.claimed if self._closed else self.ledger.completed + todo * part
        return math.ceil(max(mine, self.ledger.completed + self.outstanding) / self._batch)

    def abandoned(self) -> int:
        """Samples of the epoch that nobody trained on by all notes; final once every member has ended the epoch."""
        if self._crew is None:
            return 0
        self._crew.listen()
        return max(0, self._opening.used - self._crew.completed() - self.dropped)

    # ---- one epoch

    def _forget(self, epoch: int) -> None:
        self.ledger = Ledger(epoch)
        self.repeated = 0
        self.dropped = 0
        self._handed = Handed()
        self._closed = False
        self._crew: Crew | None = None
        self._main: Pool | None = None
        self._estates: dict[int, Estate] = {}

    def _key(self, what: str) -> str:
        return f"data/{what}/{self.epoch}"

    def _open(self) -> Wait[None]:
        """Learn what was decided about this epoch and take the first batch."""
        while self._main is None:
            value = self._desk.decided(self._key("open"))
            if value is None:
                yield f"the opening of epoch {self.epoch}"
                continue
            opening = self._opening = Opening.unpack(value)
            refuse_other_order(self.epoch, (self._total, self._digest), (opening.total, opening.digest))
            self._crew = Crew(self._desk, self.epoch, opening)
            rest = (opening.reserved, opening.used - opening.reserved)
            self._main = Pool(self._desk, self._key("draw"), [rest])
            self.ledger.claim(*opening.first(self._desk.me))
            self._look()

    @property
    def _held(self) -> int:
        return self.ledger.outstanding - self.outstanding

    def _hand_out(self, size: int) -> list[int] | None:
        amount = min(size, self._held)
        if amount == 0 or (self._drop_last and amount < size):
            self.dropped += 0 if self._closed else amount
            self._closed = True
            self._look()
            return None
        batch = self.ledger.positions(self.outstanding, amount)
        self._handed.give(amount)
        self._pace.start(self._desk.now())
        self._draw_ahead()
        return batch

    # ---- claiming

    def _fetch(self, size: int) -> Wait[bool]:
        """Wait for more claims; False when there are none for this member."""
        self._look()
        if self._held >= size:
            return True
        asked = self._asked()
        if asked is None:
            asked = self._choose()
            if asked is None:
                return (yield from self._settled())
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
        if self._closed or self._main is None or self._asked() is not None:
            return
        pool = self._choose()
        if pool is None or len(self.ledger.unfinished()) > _FRAGMENTS:
            return
        me, others = self._sight()
        amount = appetite(me, self._held, self._left(), others, self._seconds)
        if amount and not outlasts(me, min(amount, self._batch), self._left(), others):
            pool.ask(amount)

    def _leaves(self) -> Wait[bool]:
        """Whether to end this epoch here although work is left: the others finish it sooner and one of them stays."""
        me, others = self._sight()
        if self._held or not outlasts(me, self._batch, self._left(), others):
            return False
        assert self._crew is not None
        counter = self._key("leave")
        self._desk.draw(counter, 1)
        while not (answers := self._desk.drawn(counter)):
            yield f"the answer of the counter {counter!r}"
        # Who left before this ticket without its note having come may not be counted on: the fastest, for all we know.
        ahead = answers[0][0]
        me, others = self._sight()
        stay = others[max(0, ahead - self._crew.gone()) :]
        return ahead < len(others) + self._crew.gone() and outlasts(me, self._batch, self._left(), stay)

    def _look(self) -> None:
        """Enter the answers that came, hear the others, and let them know."""
        if self._crew is None:
            return
        for pool in self._pools():
            for first, amount in pool.answers():
                self.ledger.claim(first, amount)
                self.repeated += 0 if pool is self._main else amount
        open_ranges, rate = tuple(self.ledger.unfinished()), self._pace.rate
        done, claimed = self.ledger.completed, self.ledger.claimed
        note = Note(self.epoch, self._batch, rate, self._closed, done, claimed, open_ranges)
        self._desk.publish(note.pack())
        self._crew.listen()

    def _sight(self) -> tuple[Worker, list[Worker]]:
        assert self._crew is not None
        me = Worker(self._pace.rate, self.ledger.outstanding, self._batch)
        return me, self._crew.others(me)

    def _appetite(self) -> int:
        me, others = self._sight()
        return appetite(me, self._held, self._left(), others, self._seconds)

    # ---- where work comes from

    def _pools(self) -> list[Pool]:
        """What the dead left first, then the epoch's own pool."""
        left = [estate.pool for _, estate in sorted(self._estates.items()) if estate.pool is not None]
        return [*left, *([] if self._main is None else [self._main])]

    def _asked(self) -> Pool | None:
        return next((pool for pool in self._pools() if pool.asked), None)

    def _choose(self) -> Pool | None:
        self._inherit()
        return next((pool for pool in self._pools() if not pool.spent), None)

    def _inherit(self) -> None:
        assert self._crew is not None
        for rank in self._crew.dead():
            estate = self._estates.setdefault(rank, Estate(self._desk, f"{self._key('redo')}/{rank}"))
            estate.settle(self._crew.note(rank))

    def _settled(self) -> Wait[bool]:
        """Nothing is left to draw: wait for what was agreed on about the dead, if that is not known yet."""
        if any(estate.pool is None for estate in self._estates.values()):
            yield f"what the members that died in epoch {self.epoch} left"
            return True
        return False

    def _left(self) -> float:
        """Samples that nobody is known to have claimed."""
        assert self._crew is not None
        assert self._main is not None
        drawn = max(self._main.frontier, self._crew.claimed() - self._opening.reserved - self.repeated)
        rest = self._main.size - drawn - self._main.asked
        return max(0, rest) + sum(pool.left for pool in self._pools() if pool is not self._main)
