"""What a member hears of turns and does about its own, between two steps: it folds, gives, and bids, and never waits.

TOKEN, ANSWER  --pump-->  whose turn it is; what became of own pushes; who owns which shard now
give           where it is this member's turn: all that has added up
BID            where it is not: that it has something, once for each batch; who is idle in its turn says so too
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lightning_async.algorithms.delta_exchange import DeltaExchange
from lightning_async.algorithms.own_service import OwnService
from lightning_async.algorithms.owners import Owners
from lightning_async.algorithms.shards import ANOTHERS, ANSWER, BID, NOT_HERE, SOUGHT, TOKEN, shard_of
from lightning_async.algorithms.token_exchange import TokenExchange
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import Letter, Mail, Message


@dataclass
class OwnTurns:
    """One member's turns at all shards.

    Attributes:
        exchanges: One for each shard.
        owners: Who owns what.
        own: The way to its own service.
        strict: Whether the ring is never left: then nobody bids.
        step: This member's step.
        paused: Whether it is on its way to a meeting, or there.
    """

    exchanges: Sequence[TokenExchange | DeltaExchange]
    owners: Owners
    own: OwnService
    strict: bool
    step: int = 0
    paused: bool = False
    _arrivals: list[Arrival] = field(default_factory=list)

    def arrived(self) -> list[Arrival]:
        """What became of own pushes since the last call."""
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    def pause(self) -> None:
        """Nothing new adds up until all have met."""
        for exchange in () if self.paused else self.exchanges:
            exchange.clean = self.step - 1  # also who has nothing left says that it pauses, once
        self.paused = True

    def tend(self, replica: Replica, mail: Mail, kind: int | None = None) -> None:
        """Fold what came, push where a token is, say where none is."""
        self.pump(replica, mail)
        for exchange in self.exchanges:
            if kind is None:
                exchange.give(replica, mail, self.step)
            elif exchange.astray or exchange.clean < self.step:
                exchange.give(replica, mail, self.step, kind=kind)
            self._bid(exchange, mail)

    def pump(self, replica: Replica, mail: Mail) -> None:
        """Fold what came."""
        mail.lost()  # what was asked of the dead is asked of others
        for letter in mail.take(TOKEN):
            self._hear(letter.message)
            mail.folded(letter)
        for letter in mail.take(ANSWER):
            self._fold(letter, replica)
            mail.folded(letter)
        for exchange in self.exchanges:
            if self.owners.look(exchange.shard.number):
                self._move(exchange)
        self.own.tell(exchange.owner for exchange in self.exchanges)

    def say_idle(self, mail: Mail) -> None:
        """Where it is this member's turn and nothing has added up: others need not wait for that."""
        for exchange in self.exchanges:
            if not exchange.count:
                self._bid(exchange, mail, idle=True)

    def _hear(self, token: Message) -> None:
        """A turn, or whose the shard is now. There may have been more shards before what is trained changed."""
        self.owners.sought(token.reference)
        for exchange in self.exchanges:
            if exchange.shard.number == shard_of(token.reference) and token.weight != ANOTHERS:
                exchange.token = max(exchange.token, token.reference)

    def _fold(self, letter: Letter, replica: Replica) -> None:
        if letter.message.weight == SOUGHT:
            self.owners.sought(letter.message.reference)
            return
        exchange = self.exchanges[shard_of(letter.message.reference)]
        if letter.message.weight == NOT_HERE and letter.message.reference == exchange.place:
            self.owners.doubt(exchange.shard.number)
        self._arrivals += exchange.fold(letter, replica)

    def _bid(self, exchange: TokenExchange | DeltaExchange, mail: Mail, *, idle: bool = False) -> None:
        """Once for each batch, and when others are heard than before; who is `idle` in its turn says so too."""
        bid = (self.step, mail.live(), exchange.place if idle else 0)
        through = self.paused and exchange.clean >= self.step  # nothing is left to push until all have met
        if self.strict or through or exchange.has_token != idle or exchange.asked or exchange.bidden == bid:
            return
        heard = torch.tensor(bid[1], dtype=torch.int64)
        if mail.post(exchange.owner, Message(BID, heard, weight=int(idle), reference=exchange.place)):
            exchange.bidden = bid

    def _move(self, exchange: TokenExchange | DeltaExchange) -> None:
        """A shard has a new owner."""
        number = exchange.shard.number
        exchange.belongs_to(self.owners.owner(number), self.owners.place(number))
        self.own.moved(exchange)
