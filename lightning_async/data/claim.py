"""Samples are claimed while the epoch runs, by whoever is free: each exactly once, and all members end together.

    numbers   [ first batch of 0 | of 1 | of 2 | drawn from a counter ..................... ]
                its own without asking           chunks of ~10 s, then ever smaller, then single batches

The numbers are those of the epoch's rest (`ranges.Rest`): of all its positions, but for what an interrupted run has
done of them. Ledgers, notes and tickets go by numbers; what is handed out, and what is said to be done, are positions.

Every member has its first batch for certain (Lightning skips the validation of a rank without batches, and then the
others wait for it). When more is drawn, and who leaves first, is `claiming.py`'s. What a dead member left is taken over
by those still in the epoch (`sources.py`); what nobody can take is `abandoned`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_async.data.claiming import Claims, key
from lightning_async.data.crew import Desk
from lightning_async.data.handed import Handed
from lightning_async.data.ledger import Ledger
from lightning_async.data.opening import Opening, refuse_second_order, stamp, usable
from lightning_async.data.pace import Pace
from lightning_async.data.ranges import Range, Rest, each, joined
from lightning_async.transport.mail import Wait


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
        self._rest: Rest | None = None
        self._claims: Claims
        self._open(-1, Opening(0, 0, 0, 0), order=(0, 0), done=())

    @property
    def epoch(self) -> int:
        """The epoch that was begun last, -1 before the first one."""
        return self.ledger.epoch

    @property
    def ledger(self) -> Ledger:
        """What this member claimed and completed of the epoch."""
        return self._claims.ledger

    @property
    def outstanding(self) -> int:
        """Samples handed out and not completed: in workers, prefetched, or being trained on."""
        return self._handed.outstanding

    @property
    def repeated(self) -> int:
        """Samples this member took over from the dead, who may have trained on some of them."""
        return self._claims.repeated

    @property
    def rate(self) -> float:
        """This member's own speed in samples per second, 0 while unknown."""
        return self._pace.rate

    @property
    def dry(self) -> bool:
        """Whether this member takes no more work in this epoch and has trained on all it took."""
        return self._claims.closed and not self.outstanding

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
        first = max(1, min(self._batch, used // len(members))) if used else 0
        opening = Opening(total, span, used, stamp(digest, done), tuple((rank, first) for rank in members))
        self._open(epoch, opening, order=(total, digest), done=tuple(done))
        self._desk.propose(key("open", epoch), opening.pack())

    def rewind(self) -> None:
        """Hand out again what was handed out and not completed."""
        self._handed.back()

    def next_batch(self, size: int) -> Wait[list[int] | None]:
        """The next at most `size` positions; None when this member has no more work in this epoch."""
        yield from self._claims.open()
        if self._rest is None:
            self._rest = Rest(self._claims.opening.span, self._done)
        while self._claims.held < size and not self._claims.closed:
            more = yield from self._claims.fetch(size)
            if not more:
                break
        return self._hand_out(size)

    def completed(self, samples: int | None = None) -> int:
        """Count the oldest batch handed out, or so many samples, as trained on; returns how many."""
        samples = self._handed.trained(samples)
        self.ledger.complete(samples)
        self._pace.completed(samples, self._desk.now())
        self._claims.look()
        if self.dry:
            self._pace.stop()
        self._claims.draw_ahead()
        return samples

    def done(self) -> list[Range]:
        """The positions that this member completed since the epoch was opened."""
        return joined(self._positions(self.ledger.done()))

    def expected_batches(self) -> int:
        """How many batches this member will probably have trained on at the end of the epoch."""
        return self._claims.expected_batches()

    def abandoned(self) -> int:
        """Samples of the epoch that nobody trained on, by all notes; too many as long as not `settled`."""
        return max(0, self._claims.left_over() - self.dropped)

    def settled(self) -> bool:
        """Whether every living member is known to have ended the epoch."""
        return self.dry and self._claims.others_ended()

    # -- one epoch -----------------------------------------------------------------------------------------------------

    def _open(self, epoch: int, opening: Opening, *, order: tuple[int, int], done: tuple[Range, ...]) -> None:
        self.dropped = 0
        self._order, self._done = order, done
        self._rest = None
        self._handed = Handed()
        self._claims = Claims(
            self._desk,
            epoch,
            opening,
            batch=self._batch,
            seconds=self._seconds,
            pace=self._pace,
            handed=self._handed,
        )

    def _usable(self, left: int, members: int, *, resumed: bool) -> int:
        """How many of the numbers are handed out."""
        unit = self._batch if self._drop_last else 1
        if resumed or left >= members * unit:
            return usable(left, members=members, unit=unit)
        if not self._drop_last:
            raise ValueError(f"{left} samples cannot be shared by {members} members: each needs at least one")
        return 0

    def _positions(self, numbers: Iterable[Range]) -> list[Range]:
        rest = self._rest
        return [] if rest is None else [part for numbered in numbers for part in rest.positions(*numbered)]

    def _hand_out(self, size: int) -> list[int] | None:
        claims = self._claims
        amount = min(size, claims.held)
        if amount == 0 or (self._drop_last and amount < size):
            self.dropped += 0 if claims.closed else amount
            claims.close()
            return None
        batch = each(self._positions(self.ledger.ahead(self.outstanding, amount)))
        self._handed.give(amount)
        self._pace.start(self._desk.now())
        claims.draw_ahead()
        return batch
