"""A member's exchange of one shard: push what the own weights moved since the base, fold what the server moved.

    c = x - base  --PUSH-->   W, version          fold: x += W - (base + c), base = W
                  <-ANSWER-

One request is under way at a time. A push stays at home until it is answered, since the base has not moved: what an
owner that died did not answer is asked of the next one (PULL: is it in your weights?), and never counts twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_async.algorithms.shards import (
    ANSWER,
    LAST,
    MILLION,
    NOT_FINITE,
    NOT_HERE,
    PULL,
    PUSH,
    Shard,
)
from lightning_async.algorithms.wire import EXACT, Codec
from lightning_async.arrival import Arrival, Fate
from lightning_async.replica import Replica
from lightning_async.transport.mail import Letter, Mail, Message

REMEMBERED = 256
"""Own arrivals among which a takeover may find lost ones: far more than a mirror is behind."""


class Exchange:
    """What a member knows of one shard, and what is under way.

    Attributes:
        shard: Which part of the vector.
        owner: Who owns it.
        place: Shard and generation, as they travel.
        version: Of the base.
        asked: The kind of the request that is not answered yet; 0: none.
        step: The own step of the last push.
        clean: The own step up to which everything is in the server's weights, or was refused.
        samples: Samples since the last push.
        pulls: How often the newest weights came as they were asked for.
        paused: The place whose owner knows that this member pushes nothing until it has pulled; 0: none.
        idle: Whether the next push only says that nothing is left to push: it is no arrival.
    """

    def __init__(self, shard: Shard, weights: Tensor, codec: Codec, me: int) -> None:
        self.shard, self.base = shard, weights[shard.part].clone()
        self.owner = self.place = -1
        self.version = self.asked = self.step = self.clean = self.samples = self.pulls = self.paused = 0
        self._codec, self._me = codec, me
        self._pushed = torch.zeros_like(self.base)
        self._exact = True
        self._unanswered = 0
        self._sent = 0
        self.idle = self._word = False
        self._moved_in = False
        self._mine: list[tuple[int, int, int]] = []  # steps, versions and samples of own arrivals

    def belongs_to(self, owner: int, place: int) -> None:
        """The shard has another owner: what was asked of the old one will not be answered."""
        if self.asked in (PUSH, LAST):
            self._unanswered = self.number
        self._moved_in = self.place >= 0
        self.owner, self.place, self.asked = owner, place, 0

    @property
    def astray(self) -> bool:
        """Whether the shard has a new owner, who was not asked yet."""
        return self._moved_in

    @property
    def number(self) -> int:
        """Of the last push, in the owners' books: an exact one may follow a rounded one in the same step."""
        return 2 * self.step + self._exact

    # -- asking -------------------------------------------------------------------------------------------------------

    def push(
        self, replica: Replica, mail: Mail, step: int, *, kind: int, micros: int, weight: Callable[[], int]
    ) -> None:
        """Push all that is not pushed; first find out about a push that was never answered. If it cannot go: later."""
        if self._moved_in:
            self.pull(mail, step)
            return
        if not mail.free(self.owner, kind):
            return
        codec = EXACT if kind == LAST or self.owner == mail.me else self._codec
        difference = torch.sub(replica.flat[self.shard.part], self.base, out=self._pushed)
        body = codec.encode(difference)
        numbers = {"version": self.version, "echo": micros, "samples": self.samples}
        numbers["weight"] = 0 if self.idle else weight()
        number = 2 * step + (codec is EXACT)  # see `number`
        if mail.post(self.owner, Message(kind, body, step=number, reference=self.place, **numbers)):
            if body is not difference:
                self._pushed.copy_(codec.decode(body, difference.dtype))
            self.asked, self.step, self._exact = kind, step, codec is EXACT
            self._sent, self.samples = self.samples, 0
            self._word, self.idle = self.idle, False

    def pull(self, mail: Mail, step: int) -> None:
        """Ask for the newest weights; not for much older ones than these."""
        if mail.post(self.owner, Message(PULL, step=step, version=self.version, echo=0, reference=self.place)):
            self.asked = PULL

    # -- folding ------------------------------------------------------------------------------------------------------

    def fold(self, letter: Letter, replica: Replica) -> list[Arrival]:
        """Move by what the server moved without this member; steps taken meanwhile stay. What became of the push."""
        m = letter.message
        if m.reference != self.place or not self.asked:
            return []  # of an owner that was one
        asked, self.asked = self.asked, 0
        if m.weight == NOT_HERE:
            if asked != PULL:
                self._take_back()
            return []
        self.paused = self.place if asked == LAST else 0
        assert m.kind == ANSWER  # and who owns the shard answers with its weights
        assert m.body is not None
        server = m.body.to(self.base.device, self.base.dtype)
        lost = self._lost(letter) if asked == PULL and self._moved_in else []
        included = asked != PULL or (self._unanswered > 0 and m.samples >= self._unanswered)
        seen = self._pushed.add_(self.base) if included else self._pushed.copy_(self.base)
        replica.shift(torch.sub(server, seen, out=seen), at=self.shard.begin)
        if m.weight == NOT_FINITE:
            replica.mend(server, at=self.shard.begin)
        if included:
            self.clean = self.step if self._exact else self.step - 1
        elif self._unanswered:
            self._take_back()
        arrivals = [self._arrival(letter, asked)] if included and not self._word else []
        self.base.copy_(server)
        self.version, self._unanswered = m.version, 0
        self.pulls += asked == PULL
        return lost + arrivals

    def _take_back(self) -> None:
        """The last push is in nobody's weights: what it counts as is still to be pushed."""
        self.samples += self._sent

    def _arrival(self, letter: Letter, asked: int) -> Arrival:
        m = letter.message
        said = MILLION if asked == PULL else m.weight
        fate = {NOT_FINITE: Fate.REFUSED, 0: Fate.REFUSED, MILLION: Fate.FOLDED}.get(said, Fate.SHRUNK)
        at = max(0, m.version - 1)
        base, factor = min(self.version, at), max(0, said) / MILLION
        if factor > 0:
            self._mine = [*self._mine, (self.number, m.version, self._sent)][-REMEMBERED:]
        return Arrival(self._me, base, base, at, letter.seconds, self._sent, factor, fate, owner=letter.peer)

    def _lost(self, letter: Letter) -> list[Arrival]:
        """A new owner's weights are older: own arrivals that are not in them are in nobody's."""
        self._moved_in, m = False, letter.message
        known = m.samples >= 0
        lost = [one for one in self._mine if (one[0] > m.samples if known else one[1] > m.weight)]
        self._mine = [one for one in self._mine if one not in lost]
        me, owner, age = self._me, letter.peer, letter.seconds
        return [Arrival(me, v, min(v, m.version), v, age, n, 0.0, Fate.LOST, owner=owner) for _, v, n in lost]
