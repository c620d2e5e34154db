"""A member's service where pushes come by turns: it gives the tokens of the shards that it owns.

    PUSH, LAST of the holder  -->  the shard's optimizer steps  -->  ANSWER to it, TOKEN to the next
    BID of anybody            -->  the holder is idle? (turns)  -->  TOKEN to the next
    NEWS: the holder is dead  -->                                    TOKEN to the next
    TAKE: a shard is ours now -->                                    TOKEN of the new generation, to whoever has asked

    RATES of the own member   -->  the optimizers' numbers are those of run progress
    PUT of the own member     -->  a run goes on: TOKEN to whoever had it

All else is `shard_service`; the shards themselves are `turn_server`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_async.algorithms.compensation import Compensation
from lightning_async.algorithms.server_groups import Groups
from lightning_async.algorithms.server_step import ServerStep
from lightning_async.algorithms.shard_service import Answers, Owned, ShardService
from lightning_async.algorithms.shards import ANOTHERS, ANSWER, BID, LAST, MILLION, PUSH, RATES, TOKEN, Shard
from lightning_async.algorithms.turn_server import Moves, Scale, TurnServer
from lightning_async.algorithms.turns import Turns
from lightning_async.transport.mail import Letter, Message


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
        usual: Samples of a batch, on average, where members have unlike ones (see `TurnServer`).
        late: What is done about late ones.
        groups: The user's optimizer; None: pushes are moves.
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
        usual: float | None = None,
        late: Compensation,
        groups: Groups | None,
        shards: Sequence[Shard],
        **options: Any,
    ) -> None:
        self._scale, self._late, self._skip, self._groups = scale, late, skip, groups
        self._usual = usual
        self._begins = [shard.begin for shard in shards]
        self.turns = {at: Turns(first[at], skip=skip) for at in owned}
        super().__init__(me, members, owned, mirrored, **options)
        self._note_holders()

    def __call__(self, letter: Letter) -> Answers:
        """Do what the letter asks for, and give the tokens that are free then."""
        answers = [*self._served(letter), *self._tokens()]
        self._note_holders()
        return answers

    def _served(self, letter: Letter) -> Answers:
        m = letter.message
        turns = self.turns.get(m.reference)
        if m.kind == RATES and self._groups is not None:
            assert m.body is not None  # the numbers
            self._groups.hear(m.body)
            return []
        if m.kind == BID:
            if turns is not None and m.body is not None:
                turns.bid(letter.peer, m.body.tolist(), idle=bool(m.weight))
            return []
        if turns is not None and m.kind in (PUSH, LAST) and not m.weight:
            turns.pushed(letter.peer)
            return [self._paused(letter)]
        return super().__call__(letter)

    def _merge(self, owned: Owned, letter: Letter) -> Answers:
        """A push that is held for a mirror keeps the token: who is through then is known before the next one has it."""
        if (turns := self.turns.get(letter.message.reference)) is not None:
            turns.pushed(letter.peer)
            _server(owned).holder = turns.next  # an image that leaves now says whose turn is to come
        return super()._merge(owned, letter)

    def _paused(self, letter: Letter) -> tuple[int, Message]:
        """Nothing is left to push: no step, and no turn until the members have met."""
        m, server = letter.message, self.owned[letter.message.reference].server
        server.pushed[letter.peer] = m.step
        server.handed_out(letter.peer)
        server.pausing[letter.peer] = server.version
        answer = Message(ANSWER, server.weights, version=server.version, weight=MILLION, reference=m.reference)
        return letter.peer, answer

    def _tokens(self) -> Iterator[tuple[int, Message]]:
        if self.turns.keys() != self.owned.keys():
            yield from self._begin_turns()
        for at, turns in self.turns.items():
            server = self.owned[at].server
            alone = len(server.members) == 1  # what its last push rounded off it may push again
            away, unheard = ((), ()) if alone else (server.pausing, server.unheard)
            granted = turns.grant(server.members, away, unheard)
            if granted is not None:
                yield granted, Message(TOKEN, reference=at)
            for late in turns.meet(server.members, server.unheard):
                yield late, Message(TOKEN, reference=at)

    def _begin_turns(self) -> Iterator[tuple[int, Message]]:
        """Of what was taken over all hear: who waits for a token asks nobody for anything, and may believe in another
        owner."""
        taken = self.owned.keys() - self.turns.keys()
        self.turns = {at: self.turns.get(at) or self._inherited(owned) for at, owned in self.owned.items()}
        for at in sorted(taken):
            for member in sorted(self.owned[at].server.unheard):
                yield member, Message(TOKEN, weight=ANOTHERS, reference=at)

    def _inherited(self, owned: Owned) -> Turns:
        """The turns go on with whose the image said; without one the heir comes last."""
        holder = _server(owned).holder
        after = self._me if holder is None else holder - 1
        return Turns(after=after, skip=self._skip, strangers=owned.server.unheard)

    def _note_holders(self) -> None:
        for at, turns in self.turns.items():
            _server(self.owned[at]).holder = turns.holder

    def _put(self, letter: Letter) -> Answers:
        """At a meeting nobody is passed over and nobody bids, so who has the token is all that the turns are."""
        answers = [*super()._put(letter)]
        for at, owned in self.owned.items():
            if (holder := _server(owned).holder) is not None:
                self.turns[at] = Turns(holder, skip=self._skip)
                answers.append((holder, Message(TOKEN, reference=at)))
        return answers

    def anew(self, weights: Tensor) -> TurnServer:
        """A server of some weights, for who cuts shards anew."""
        return self._new(weights, 0)

    def _new(self, weights: Tensor, number: int) -> TurnServer:
        groups, begin = self._groups, self._begins[number]
        make = Moves if groups is None else lambda part: ServerStep(part, groups, begin)
        rules = replace(self._rules, make_outer=make)
        how: dict[str, Any] = {"shrink": self._shrink, "scale": self._scale, "usual": self._usual, "late": self._late}
        return TurnServer(rules, weights, self._members, **how)


def _server(owned: Owned) -> TurnServer:
    assert isinstance(owned.server, TurnServer)  # `_new` makes no others
    return owned.server
