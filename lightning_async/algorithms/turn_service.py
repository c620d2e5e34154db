"""A member's service where pushes come by turns: it gives the tokens of the shards that it owns.

    PUSH, LAST of the holder  -->  the shard's optimizer steps  -->  ANSWER to it, TOKEN to the next
    BID of another            -->  the holder is idle? (turns)  -->  TOKEN to the next
    NEWS: the holder is dead  -->                                    TOKEN to the next
    TAKE: a shard is ours now -->                                    TOKEN of the new generation

    RATES of the own member   -->  the optimizers' numbers are those of run progress

All else is `shard_service`. What a push counts: "sum" 1/n, "mean" 1/(batches in it), "delay" 1/n by a law of how late.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from lightning_async.algorithms.server_groups import Groups
from lightning_async.algorithms.server_step import ServerStep
from lightning_async.algorithms.shard_server import ShardServer
from lightning_async.algorithms.shard_service import Answers, Owned, ShardService
from lightning_async.algorithms.shards import ANSWER, BID, LAST, MILLION, PUSH, RATES, TOKEN, Shard
from lightning_async.algorithms.turns import Turns
from lightning_async.algorithms.weighting import excess_rounds
from lightning_async.transport.mail import Letter, Message

Scale = Literal["sum", "mean", "delay"]


@dataclass
class TurnServer(ShardServer):
    """A shard whose pushes are sums of gradients.

    Attributes:
        scale: What a push counts.
        worths: How many batches were in each member's last push.
    """

    scale: Scale = "sum"
    outer: ServerStep = field(init=False)

    def _merge(self, letter: Letter, correction: Tensor, gamma: float) -> None:
        """With "mean" each push is a step of its own."""
        n, batches = len(self.members), letter.message.weight
        self.worths[letter.peer] = float(batches)
        among = n * len(self.worths) / sum(self.worths.values())
        share, among = (1.0, 1.0) if self.scale == "mean" else (batches / n, among)
        self.outer.arrive(self.weights, correction, gamma, n, share=share, among=among)

    def _gamma(self, letter: Letter, delay: int) -> float:
        n = len(self.members)
        if self.scale == "mean":
            return 1 / letter.message.weight
        return (self.rules.law(excess_rounds(delay, n)) if self.scale == "delay" else 1.0) / n


class TurnService(ShardService):
    """What one member serves (see `ShardService`).

    Args:
        me: The member.
        members: Who lives.
        owned: The first weights of the shards that it owns, by their places.
        mirrored: The same of those whose first mirrors it holds.
        first: Who holds the first tokens, by place.
        skip: Whether idle holders are passed over.
        scale: What a push counts.
        groups: The user's optimizer.
        shards: How the vector is cut.
        options: What `ShardService` takes beside.
    """

    def __init__(
        self,
        me: int,
        members: tuple[int, ...],
        owned: Mapping[int, Tensor],
        mirrored: Mapping[int, Tensor],
        *,
        first: Mapping[int, int],
        skip: bool,
        scale: Scale,
        groups: Groups,
        shards: Sequence[Shard],
        **options: Any,
    ) -> None:
        self._scale, self._skip, self._groups = scale, skip, groups
        self._begins = [shard.begin for shard in shards]
        self.turns = {at: Turns(first[at], skip=skip) for at in owned}
        super().__init__(me, members, owned, mirrored, **options)

    def __call__(self, letter: Letter) -> Answers:
        """Do what the letter asks for, and give the tokens that are free then."""
        return [*self._served(letter), *self._tokens()]

    def _served(self, letter: Letter) -> Answers:
        m = letter.message
        turns = self.turns.get(m.reference)
        if m.kind == RATES:
            assert m.body is not None  # the numbers
            self._groups.hear(m.body)
            return []
        if m.kind == BID:
            if turns is not None and m.body is not None:
                turns.bid(letter.peer, m.body.tolist())
            return []
        if turns is not None and m.kind in (PUSH, LAST) and not m.weight:
            turns.pushed(letter.peer)
            return [self._paused(letter)]
        return super().__call__(letter)

    def _merge(self, owned: Owned, letter: Letter) -> Answers:
        """A push that is held for a mirror keeps the token: who is through then is known before the next one has it."""
        if (turns := self.turns.get(letter.message.reference)) is not None:
            turns.pushed(letter.peer)
        return super()._merge(owned, letter)

    def _paused(self, letter: Letter) -> tuple[int, Message]:
        """Nothing is left to push: no step, and no turn until the members have met."""
        m, server = letter.message, self.owned[letter.message.reference].server
        server.pushed[letter.peer] = m.step
        server.pausing[letter.peer] = server.bases[letter.peer] = server.version
        answer = Message(ANSWER, server.weights, version=server.version, weight=MILLION, reference=m.reference)
        return letter.peer, answer

    def _tokens(self) -> Iterator[tuple[int, Message]]:
        self.turns = {at: self.turns.get(at) or Turns(after=self._me, skip=self._skip) for at in self.owned}
        for at, turns in self.turns.items():
            server = self.owned[at].server
            granted = turns.grant(server.members, server.pausing)
            if granted is not None:
                yield granted, Message(TOKEN, reference=at)

    def _new(self, weights: Tensor, number: int) -> TurnServer:
        begin = self._begins[number]
        rules = replace(self._rules, make_outer=lambda weights: ServerStep(weights, self._groups, begin))
        return TurnServer(rules, weights, self._members, shrink=self._shrink, scale=self._scale)
