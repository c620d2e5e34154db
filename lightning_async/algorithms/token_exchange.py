"""A member's exchange of one shard by turns: gradients add up until the token comes, then go as one push.

    sum += g, count + 1  ...  token  --PUSH (sum, count, oldest base)-->  W, version      x = W, to the bit
                                     <-ANSWER------------------------

The member takes no steps of its own, so it is exactly at the weights that it pulled last. What was pushed stays at home
until it is answered: if its owner dies before, the heir is asked whether it is in the weights, and if not it is added
back. So no gradient is pushed twice, and none is lost but with the weights it moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_async.algorithms.exchange import Exchange
from lightning_async.algorithms.shards import LAST, NOT_HERE, PULL, PUSH, Shard
from lightning_async.algorithms.wire import EXACT
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import Letter, Mail, Message


class TokenExchange(Exchange):
    """What a member knows of one shard, and what has added up.

    Attributes:
        step: The number of the last push (see `Exchange`; not an own step here: there may be two in one).
        count: Batches in the sum.
        token: The place whose token came last.
        bidden: For which step, and hearing whom, it last said that it waits; or that it is idle in the turn of a place.
    """

    def __init__(self, shard: Shard, weights: Tensor, me: int) -> None:
        super().__init__(shard, weights, EXACT, me)
        self.count = self.token = 0
        self.bidden: tuple[int, tuple[int, ...], int] = (0, (), 0)
        self._sum = torch.zeros_like(self.base)
        self._oldest = self._given_oldest = self._given = self._at = 0

    @property
    def has_token(self) -> bool:
        """Whether it is this member's turn."""
        return self.token == self.place

    @property
    def number(self) -> int:
        """Of the last push."""
        return self.step

    def add(self, gradient: Tensor, samples: int) -> None:
        """One batch more."""
        if not self.count:
            self._oldest = self.version
        self._sum.add_(gradient[self.shard.part])
        self.count += 1
        self.samples += samples

    # -- asking -------------------------------------------------------------------------------------------------------

    def give(self, replica: Replica, mail: Mail, step: int, *, kind: int = PUSH) -> None:
        """If it is this member's turn push the sum; first find out about a push that was never answered."""
        if self.asked:
            return
        if self._moved_in or (kind == PUSH and self.paused):  # it could not be told at the meeting that this goes on
            self.pull(mail, self.step)
        elif self.has_token and (self.count or kind == LAST):
            self._give(mail, step, kind)

    def _give(self, mail: Mail, step: int, kind: int) -> None:
        base = self._oldest if self.count else self.version
        numbers = {"step": self.step + 1, "version": base, "samples": self.samples, "weight": self.count}
        if mail.post(self.owner, Message(kind, self._sum, reference=self.place, echo=0, **numbers)):
            self._pushed.copy_(self._sum)
            self._sum.zero_()
            self._given, self._given_oldest, self._sent = self.count, base, self.samples
            self.asked, self._at, self.token = kind, step, 0
            self.step += 1
            self.count = self.samples = 0

    def _take_back(self) -> None:
        """The last push is in nobody's weights."""
        self._oldest = self._given_oldest if self._given else self._oldest
        self._sum.add_(self._pushed)
        self.count += self._given
        self.samples += self._sent
        self._given = self._sent = 0

    # -- folding ------------------------------------------------------------------------------------------------------

    def fold(self, letter: Letter, replica: Replica) -> list[Arrival]:
        """Be where the server is. What became of the push."""
        m = letter.message
        if m.reference != self.place or not self.asked:
            return []  # of an owner that was one
        asked, self.asked = self.asked, 0
        if m.weight == NOT_HERE:
            self._unanswered = self._unanswered if asked == PULL else self.step
            return []
        self.paused = self.place if asked == LAST else 0
        assert m.body is not None  # and who owns the shard answers with its weights
        lost = self._lost(letter) if asked == PULL and self._moved_in else []
        included = asked != PULL or (self._unanswered > 0 and m.samples >= self._unanswered)
        if self._unanswered and not included:
            self._take_back()
        if asked == LAST:
            self.clean = self._at
        arrivals = self._became(letter, asked) if included else []
        self.base.copy_(m.body)
        replica.go_to(self.base, at=self.shard.begin)
        self.version, self._unanswered = m.version, 0
        self.pulls += asked == PULL
        return lost + arrivals

    def _became(self, letter: Letter, asked: int) -> list[Arrival]:
        if not self._given:
            return []
        self.version = self._given_oldest
        self._given = 0
        return [self._arrival(letter, asked)]

    def belongs_to(self, owner: int, place: int) -> None:
        """Another owner: it is told again what it may not know, and at a meeting that this member pauses."""
        super().belongs_to(owner, place)
        self.clean = min(self.clean, self._at - 1)
