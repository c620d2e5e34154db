"""An exchange: what was pushed and not answered is asked of an heir, and is in its weights or is pushed again: all of
it, also what a rounded push left behind and an exact one of the same step took along."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from lightning_async.algorithms.exchange import Exchange
from lightning_async.algorithms.shards import ANSWER, LAST, MILLION, PUSH, cut
from lightning_async.algorithms.wire import ROUNDED
from lightning_async.arrival import Fate
from lightning_async.replica import Replica
from lightning_async.transport.mail import Letter, Message

FIRST, SECOND, THIRD = 11, 12, 13
STEP = 5


@dataclass
class Outbox:
    """A mail that takes everything."""

    me: int = 0
    sent: list[Message] = field(default_factory=list)

    def free(self, peer: int, kind: int) -> bool:
        return True

    def post(self, peer: int, message: Message) -> bool:
        self.sent.append(message)
        return True


def answer(exchange: Exchange, replica: Replica, weights: Tensor, version: int, newest: int = 0) -> list[Fate]:
    m = Message(ANSWER, weights, version=version, reference=exchange.place, weight=MILLION, samples=newest)
    return [a.fate for a in exchange.fold(Letter(exchange.owner, 1, m, 0.0), replica)]


@pytest.mark.parametrize("answered", [False, True])
def test_what_rounding_took_dies_with_no_owner_uncounted(answered: bool) -> None:
    """The mirror has the rounded push; the exact one of the same step, at a meeting, was the owner's alone."""
    parameter = nn.Parameter(torch.zeros(16))
    replica, outbox = Replica([parameter]), Outbox()
    exchange = Exchange(cut(16, 1)[0], replica.flat, ROUNDED, 0)
    exchange.belongs_to(FIRST, FIRST)
    exchange.belongs_to(SECOND, SECOND)  # not the first of a run: it may have to be asked
    exchange.pull(outbox, 0)
    answer(exchange, replica, torch.zeros(16), 0)

    parameter.data.fill_(1 + 2**-10)  # bfloat16 has seven bits behind the point
    push = {"kind": PUSH, "micros": 0, "weight": lambda: 1}
    exchange.push(replica, outbox, STEP, **push)
    mirrored = outbox.sent[-1].step
    seen = outbox.sent[-1].body.float()
    answer(exchange, replica, seen, 1)
    assert torch.equal(replica.flat - exchange.base, torch.full((16,), 2**-10))

    exchange.push(replica, outbox, STEP, **push | {"kind": LAST})
    if answered:
        assert answer(exchange, replica, seen + 2**-10, 2) == [Fate.FOLDED]
        assert exchange.clean == STEP
    exchange.belongs_to(THIRD, THIRD)
    exchange.push(replica, outbox, STEP, **push)  # first it asks
    fates = answer(exchange, replica, seen, 1, newest=mirrored)
    if answered:  # it is in nobody's weights: that is said
        assert fates == [Fate.LOST]
    else:  # it is still to be pushed
        assert fates == []
        assert exchange.clean < STEP
        assert torch.equal(replica.flat - exchange.base, torch.full((16,), 2**-10))
