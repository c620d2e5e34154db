"""A member's exchange of one shard by turns, where its own optimizer steps: what it moved since the base is one push.

    own steps ...  token  --PUSH (x - base, count, base)-->  W, version       x += W - (base + pushed),  base = W
    own steps ...         <-ANSWER-------------------------

It is the exchange of `exchange` with a token: a push stays in `x` until it is answered, so none is lost or counted
twice, and the steps that are taken while it travels stay. Nothing is rounded on the way.
"""

from __future__ import annotations

from torch import Tensor

from lightning_async.algorithms.exchange import Exchange
from lightning_async.algorithms.shards import LAST, PUSH, Shard
from lightning_async.algorithms.wire import EXACT
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import Letter, Mail


class DeltaExchange(Exchange):
    """What a member knows of one shard, and what it moved there.

    Attributes:
        count: Steps since the last push.
        token: The place whose token came last.
        bidden: For which step, and hearing whom, it last said that it waits; or that it is idle in the turn of a place.
    """

    def __init__(self, shard: Shard, weights: Tensor, me: int) -> None:
        super().__init__(shard, weights, EXACT, me)
        self.count = self.token = 0
        self.bidden: tuple[int, tuple[int, ...], int] = (0, (), 0)
        self._given = self._at = 0

    @property
    def has_token(self) -> bool:
        """Whether it is this member's turn."""
        return self.token == self.place

    def add(self, gradient: Tensor, samples: int) -> None:
        """One own step more, which has used the gradient."""
        self.count += 1
        self.samples += samples

    def give(self, replica: Replica, mail: Mail, step: int, *, kind: int = PUSH) -> None:
        """If it is this member's turn push what moved; first find out about a push that was never answered."""
        if kind == PUSH and self.paused and not self.asked:  # it could not be told at the meeting that this goes on
            self.pull(mail, step)
        if self.asked or not (self.astray or (self.has_token and (self.count or kind == LAST))):
            return
        self.push(replica, mail, step, kind=kind, micros=0, weight=lambda: max(1, self.count))
        if self.asked == kind:
            self._at, self._given, self.count, self.token = step, self.count, 0, 0

    def _take_back(self) -> None:
        super()._take_back()
        self.count, self._given = self.count + self._given, 0

    def fold(self, letter: Letter, replica: Replica) -> list[Arrival]:
        """Move by what the server moved without this member. Only an answer to the last push says that all know it."""
        asked, clean = self.asked, self.clean
        arrivals = super().fold(letter, replica)
        if asked != LAST:
            self.clean = clean
        return arrivals

    def belongs_to(self, owner: int, place: int) -> None:
        """Another owner: it is told again what it may not know, and at a meeting that this member pauses."""
        super().belongs_to(owner, place)
        self.clean = min(self.clean, self._at - 1)
