"""A meeting at the server: all push what is left, unrounded; when all have, all pull, and compare what they pulled.

    LAST --> answered    agree: all is pushed    PULL --> W    agree: place and version of each shard --> the same?

Who pulled from an owner that has died meanwhile pulls again from its heir, until all have the same weights, to the bit.
What is agreed on is what a member had when it said its word: who hears of an heir later keeps to it. Who has heard of
an heir and not pulled from it yet says so (`UNSEEN`), in the place of a version that the heir need not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lightning_async.algorithms.exchange import Exchange
from lightning_async.algorithms.owners import Owners
from lightning_async.replica import Replica
from lightning_async.transport.mail import Mail, Wait
from lightning_async.transport.rounds import Rounds

T = TypeVar("T")
UNSEEN = -1
TRIES = 3
"""So often a member alone pushes: what the first push rounds off, the next one brings."""


@dataclass
class ServerMeeting:
    """One member's part of a meeting.

    Attributes:
        exchanges: One for each shard.
        owners: Who owns what.
        rounds: What all agree by.
        step: This member's step.
        pump: Folds what has come.
        push: Pushes all of a shard that is not pushed yet.
        pausing: Whether the others must hear from a member that has nothing to push.
        acting: Who owns each shard by the consensus.
        places: Their places.
    """

    exchanges: list[Exchange]
    owners: Owners
    rounds: Rounds
    step: int
    pump: Callable[[], None]
    push: Callable[[Exchange], None]
    pausing: bool
    acting: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def consensus(self, replica: Replica, mail: Mail) -> Wait[Tensor]:
        """The server's weights when all have pushed."""
        yield from self.push_all(replica, mail)
        yield from self._attending(self.rounds.agree(b"", what="all is pushed"))
        behind = list(self.exchanges)
        while True:
            for exchange in behind:
                yield from self._pull(exchange, mail)
            weights = torch.cat([x.base for x in self.exchanges])
            owners, places = [x.owner for x in self.exchanges], [x.place for x in self.exchanges]
            newest = yield from self._newest()
            if newest is None:
                self.acting, self.places = owners, places
                return weights
            behind = [x for x, most in zip(self.exchanges, newest, strict=True) if self._lags(x, most)]

    def answered(self, exchange: Exchange) -> Wait[None]:
        """Until nothing of this shard is under way."""
        self.pump()
        while exchange.asked:
            yield f"rank {exchange.owner}'s answer on shard {exchange.shard.number}"
            self.pump()

    def push_all(self, replica: Replica, mail: Mail) -> Wait[None]:
        """All shards, one after the other; again what another member took over meanwhile that must hear it too."""
        while True:
            for exchange in self.exchanges:
                yield from self._push_all(exchange, replica, mail)
            if all(exchange.clean >= self.step for exchange in self.exchanges):
                return

    def _attending(self, waiting: Wait[T]) -> Wait[T]:
        """Wait, and be there meanwhile: the others may need this member as an heir, which it must hear of to be one."""
        while True:
            try:
                what = next(waiting)
            except StopIteration as end:
                result: T = end.value
                return result
            self.pump()
            yield what

    def _push_all(self, exchange: Exchange, replica: Replica, mail: Mail) -> Wait[None]:
        yield from self.answered(exchange)
        alone = mail.members() == (mail.me,)
        if self.pausing:
            exchange.idle = exchange.clean >= self.step
            exchange.clean = min(exchange.clean, self.step - 1)
        for _ in range(TRIES if alone else 1):
            while exchange.clean < self.step or self._is_untold(exchange):
                exchange.idle = exchange.idle or exchange.clean >= self.step
                self.push(exchange)
                if not exchange.asked:
                    yield f"rank {exchange.owner} to take the last of shard {exchange.shard.number}"
                yield from self.answered(exchange)
            if alone and not torch.equal(replica.flat[exchange.shard.part], exchange.base):
                exchange.clean = self.step - 1

    def _is_untold(self, exchange: Exchange) -> bool:
        """Whether the last push was found in the books of an heir, who need not know that it was the last."""
        return self.pausing and exchange.paused != exchange.place

    def _pull(self, exchange: Exchange, mail: Mail) -> Wait[None]:
        before = exchange.pulls
        while exchange.pulls == before:
            exchange.pull(mail, self.step)
            if not exchange.asked:
                yield f"rank {exchange.owner} to be asked for shard {exchange.shard.number}"
            yield from self.answered(exchange)

    def _newest(self) -> Wait[list[tuple[int, int]] | None]:
        """The newest place and version of each shard that anybody pulled; None: all pulled those."""
        mine = ",".join(f"{x.place}:{UNSEEN if x.astray else x.version}" for x in self.exchanges)
        words = yield from self._attending(self.rounds.agree(mine.encode(), what="the same weights"))
        read = [[_pair(one) for one in word.decode().split(",")] for word in words.values()]
        if all(one == read[0] for one in read) and all(version != UNSEEN for _, version in read[0]):
            return None
        return [max(column) for column in zip(*read, strict=True)]

    def _lags(self, exchange: Exchange, newest: tuple[int, int]) -> bool:
        if exchange.place < newest[0]:
            self.owners.doubt(exchange.shard.number)
        return exchange.astray or (exchange.place, exchange.version) < newest


def _pair(word: str) -> tuple[int, int]:
    place, _, version = word.partition(":")
    return int(place), int(version)
