"""Two receives stand on a link at any time, so a body needs no announcement, whatever came before it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from lightning_async.transport.line import HEAD_TAG, WINDOW
from lightning_async.transport.mail import Message
from lightning_async.transport.shared import BODY_TAG, Written
from tests.transport.test_link import End, until

PIECE = 1 << 17
Pair = tuple[End, End]


@pytest.fixture(params=[True, False], ids=["shared", "gloo"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    store = HashStore()
    ends = tuple(End(store, me, 1 - me, shared_memory=request.param) for me in range(2))
    with ExitStack() as stack:
        for end in ends:
            stack.callback(end.open(fragment_bytes=PIECE).close)
        until(lambda: all(end.link.state == "up" for end in ends))
        until(lambda: all(end.link.line.peer_seen for end in ends))  # pings, at the latest
        yield ends  # type: ignore[misc]


class Gagged:
    """A wire on which no header leaves while it is `silent`."""

    def __init__(self, end: End) -> None:
        self.end, self.wire, self.silent = end, end.link.line.running(), True
        end.link.line.wire = self  # type: ignore[assignment]

    def send(self, tensor: Tensor, tag: int) -> Any:
        return Written() if self.silent and tag == HEAD_TAG else self.wire.send(tensor, tag)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wire, name)


def bytes_of(length: int) -> Tensor:
    return torch.randint(0, 256, (length,), dtype=torch.uint8)


def travels(a: End, b: End, body: Tensor, kind: int = 20) -> None:
    assert a.slots.post(Message(kind, body))
    letter = b.take(kind)
    assert torch.equal(letter.message.body, body)  # type: ignore[arg-type]
    b.slots.folded(letter)
    until(lambda: a.slots.free(kind))


def test_a_body_of_two_pieces_arrives_without_a_word_of_its_receiver(pair: Pair) -> None:
    a, b = pair
    travels(a, b, bytes_of(5 * PIECE))
    until(lambda: not a.link.sender._unread or a.link.line.peer_seen >= a.link.sender._unread[-1].header)
    gagged, body = Gagged(b), bytes_of(WINDOW * PIECE - 5)
    assert a.slots.post(Message(21, body))
    letter = b.take(21)
    assert torch.equal(letter.message.body, body)  # type: ignore[arg-type]
    longer = bytes_of((WINDOW + 2) * PIECE)
    assert a.slots.post(Message(22, longer))
    gagged.end.link.line.wire, gagged.silent = gagged.wire, False  # a longer one needs answers, and now gets them
    assert torch.equal(b.take(22).message.body, longer)  # type: ignore[arg-type]


def test_there_are_never_more_pieces_on_the_wire_than_receives_that_stand(pair: Pair) -> None:
    """Counted at every send: what is unread, of this body and of others, both ways at once."""
    most, wires = [0, 0], [end.link.line.running() for end in pair]
    for me, end in enumerate(pair):

        class Counted:
            def send(self, tensor: Tensor, tag: int, me: int = me, end: End = end) -> Any:
                if tag == BODY_TAG:
                    unread = [x for x in end.link.sender._unread if x.header > end.link.line.peer_seen]
                    most[me] = max(most[me], len(unread) + 1)
                return wires[me].send(tensor, tag)

            def __getattr__(self, name: str, me: int = me) -> Any:
                return getattr(wires[me], name)

        end.link.line.wire = Counted()  # type: ignore[assignment]
    bodies = {kind: bytes_of(PIECE * (kind - 18) + 77) for kind in range(20, 24)}
    for end in pair:
        for kind, body in bodies.items():
            assert end.slots.post(Message(kind, body))
    for end in pair:
        for kind, body in bodies.items():
            assert torch.equal(end.take(kind).message.body, body)  # type: ignore[arg-type]
    assert most == [WINDOW, WINDOW]
    assert all(len(end.link.receiver._standing) == WINDOW for end in pair)


@pytest.mark.few(2)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_lengths_of_bodies_and_pieces_they_arrive_as_they_were(pair: Pair, seed: int) -> None:
    """Pieces become shorter and longer from body to body, as on a link that is slow at times."""
    chance, (a, b) = random.Random(seed), pair
    for _ in range(30):
        a.link.line.pieces.length = chance.choice([PIECE, PIECE // 2, PIECE // 3, 30_001, 1 << 16])
        travels(a, b, bytes_of(chance.choice([10, 70_000, PIECE, PIECE + 1, 2 * PIECE, 5 * PIECE - 3])), 20)
        travels(b, a, bytes_of(chance.choice([0, 66_000, 3 * PIECE])), chance.choice([20, 21]))


def test_pieces_are_no_longer_than_the_other_end_takes() -> None:
    store = HashStore()
    a, b = (End(store, me, 1 - me, shared_memory=False) for me in range(2))
    with ExitStack() as stack:
        stack.callback(a.open(fragment_bytes=1 << 20).close)
        stack.callback(b.open(fragment_bytes=1 << 16).close)
        until(lambda: a.link.state == b.link.state == "up")
        assert (a.link.line.room, b.link.line.room) == (1 << 16, 1 << 20)
        travels(a, b, bytes_of(300_000))
        travels(b, a, bytes_of(300_000))
