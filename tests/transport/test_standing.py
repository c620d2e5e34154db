"""Both ends know the same of what stands, whatever is sent; on a link, only the first body of a kind is announced."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from lightning_async.transport.gloo import Pending
from lightning_async.transport.mail import Message
from lightning_async.transport.shared import BODY_TAG
from lightning_async.transport.standing import TAG, Standing
from tests.transport.test_link import End, until

FRAGMENT = 1000


def test_both_ends_agree_on_every_body() -> None:
    """The sender hears of a fold later than the receiver, but before it can send the next body of that kind."""
    for seed in range(50):
        chance, number = random.Random(seed), 0
        sender, receiver = Standing(FRAGMENT, possible=True), Standing(FRAGMENT, possible=True)
        under_way: dict[int, int] = {}
        for _ in range(100):
            kind = chance.randrange(16, 19)
            if kind in under_way:
                stands = receiver.folded(under_way[kind])
                assert stands == sender.folded(under_way.pop(kind))
            number, nbytes = number + 1, chance.choice([1, 999, 1000, 1001, 5000])
            assert sender.claim(kind, nbytes) == receiver.claim(kind, nbytes)
            for end in (sender, receiver):
                end.carried(number, kind, nbytes)
            under_way[kind] = number


def test_a_kind_stands_as_long_as_its_bodies_have_as_many_fragments() -> None:
    end = Standing(FRAGMENT, possible=True)
    stood = []
    for number, nbytes in enumerate([2000, 1001, 2000, 2001, 2001, 2001]):
        stood.append(end.claim(20, nbytes))
        end.carried(number, 20, nbytes)
        end.folded(number)
    assert stood == [False, True, True, False, False, False]


def test_nothing_stands_where_bodies_take_another_way() -> None:
    end = Standing(FRAGMENT, possible=False)
    end.carried(1, 20, 5000)
    assert end.folded(1) is None
    assert not end.claim(20, 5000)
    assert end.room(5001) == 5001


def test_on_a_link_what_stands_is_not_announced_and_arrives_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    a, b = End(store, 0, 1, shared_memory=False), End(store, 1, 0, shared_memory=False)
    tags: list[int] = []
    with ExitStack() as stack:
        for end in (a, b):
            stack.callback(end.open(fragment_bytes=1 << 17).close)
        until(lambda: a.link.state == b.link.state == "up")
        wire = a.link.line.running()
        send = wire.send

        def noted(tensor: Tensor, tag: int) -> Pending:
            tags.append(tag)
            return send(tensor, tag)

        monkeypatch.setattr(wire, "send", noted)
        sizes = [3 << 17, (3 << 17) - 5000, 100, 3 << 17, 1 << 17, 1 << 17]
        for size in sizes:
            body = torch.randint(0, 256, (size,), dtype=torch.uint8)
            assert a.slots.post(Message(20, body))
            letter = b.take(20)
            assert letter.message.body is not None
            assert torch.equal(letter.message.body, body)
            b.slots.folded(letter)
            until(lambda: a.slots.free(20))
    bodies = [tag for tag in tags if tag == BODY_TAG or tag >= TAG]
    assert bodies == [BODY_TAG] * 3 + [TAG + 20] * 6 + [BODY_TAG] * 2
