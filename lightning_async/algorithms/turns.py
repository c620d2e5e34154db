"""Whose turn it is at one shard: one token, given round the ring of those that live and do not pause.

    member 0 --> 1 --> 2 --> 3 --> 0           the holder pushes: its turn ends, the next one's begins
                       |                       "skip": it keeps two batches of another one waiting: it is passed over,
                       +--> may push late      keeps its right to push once, and gets no other token until it has;
                                               so does a holder that has nothing to push and waits for another shard

The shard's server gives the tokens, in one place and one order: so there is exactly one for each shard and generation,
and none can be lost but with a member that is declared dead, which the server hears of.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

BATCHES = 2
"""So many batches of one other member may end during a turn; then the holder is idle."""


class Turns:
    """The turns of one shard.

    Args:
        first: Who holds the token; None: nobody yet.
        after: Where nobody does: the one before the first.
        skip: Whether an idle holder is passed over.
        strangers: Of a shard that was taken over: of whom nothing was heard since.

    Attributes:
        holder: Who has the token; None: nobody that may.
        passed: Who was passed over and has not pushed since.
    """

    def __init__(
        self, first: int | None = None, *, after: int = -1, skip: bool, strangers: Collection[int] = ()
    ) -> None:
        self.holder, self.passed = first, set[int]()
        self._last = after if first is None else first
        self._skip = skip
        self._strangers = set(strangers) if skip else set[int]()
        self._bids: dict[int, int] = {}

    @property
    def next(self) -> int:
        """Who has the token; where nobody does, the rank behind who had it, whether there is one or not."""
        return self._last + 1 if self.holder is None else self.holder

    def pushed(self, peer: int) -> None:
        """A push has come, of the holder or of one that was passed over."""
        if peer == self.holder:
            self.holder = None
        self.passed.discard(peer)

    def bid(self, peer: int, live: Collection[int], *, idle: bool = False) -> None:
        """A batch of a member has ended without the token; it hears these. Or the holder is idle and waits for the turn
        of another shard: who waits for this one may be whom it waits for."""
        if idle and self._skip and peer == self.holder:
            self.passed.add(peer)
            self.holder = None
        if idle or not self._skip or self.holder is None or peer == self.holder:
            return
        self._bids[peer] = self._bids.get(peer, 0) + 1
        if self._bids[peer] >= BATCHES or self.holder not in live:
            self.passed.add(self.holder)
            self.holder = None

    def meet(self, members: Collection[int], unheard: Collection[int]) -> list[int]:
        """Who was heard for the first time since a takeover may push once, whoever's turn it is: the heir does not know
        whose turn was before, and who waits for a turn here may keep all others waiting at another shard."""
        met = self._strangers.difference(unheard)
        self._strangers -= met
        late = sorted(met.intersection(members) - self.passed - {self.holder})
        self.passed.update(late)
        return late

    def grant(self, members: Sequence[int], pausing: Collection[int], unheard: Collection[int] = ()) -> int | None:
        """Who gets the token now; None: it is somebody's already, or nobody may have it. Who was not heard since a
        takeover may be frozen, or not have heard of the heir: the ring goes on without it, or "strict" waits for it."""
        self.passed &= set(members)
        if self.holder in members:
            return None
        ring = [rank for rank in members if rank > self._last] + [rank for rank in members if rank <= self._last]
        away = self.passed.union(pausing, unheard if self._skip else ())
        self.holder = next((rank for rank in ring if rank not in away), None)
        if self.holder in unheard:
            self.holder = None
        if self.holder is not None:
            self._last, self._bids = self.holder, {}
        return self.holder
