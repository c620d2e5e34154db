"""A long body arrives however slow the network is; how long its pieces are follows from how long they take."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from lightning_async.transport import gloo
from lightning_async.transport.cluster import ClusterCarrier
from lightning_async.transport.mail import Message
from lightning_async.transport.pieces import LEAST, Pieces
from tests.transport.worlds import BUSY

KIND = 20
LONGEST = 100_000  # bytes that the wire carries within the patience
BODY = torch.arange(180_000, dtype=torch.float32)  # more than seven of them


class SlowWire(gloo.Wire):
    """A wire on which whatever is longer than `LONGEST` would outlast the patience, so that it is given up there."""

    def send(self, tensor: Tensor, tag: int) -> Any:
        if tensor.numel() * tensor.element_size() > LONGEST:
            self.cancel()
            raise RuntimeError("nothing was heard for longer than the patience")
        return super().send(tensor, tag)


def test_a_body_that_travels_longer_than_the_patience_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece it would never: each time the line falls silent, the link is made anew and the body begins again."""
    monkeypatch.setattr("lightning_async.transport.link.Wire", SlowWire)
    store, knobs = HashStore(), {"tick": 0.02, "interface": "lo"}
    with ExitStack() as stack:
        a, b = (
            stack.enter_context(
                ClusterCarrier(store=store, me=me, world=2, run="test", shared_memory=False, **knobs)  # type: ignore[arg-type]
            )
            for me in range(2)
        )
        generations = []
        for _ in range(4):
            end = time.monotonic() + BUSY
            while not a.post(1, Message(KIND, BODY)):
                assert time.monotonic() < end, "the slot was never free"
                a.wait(0.01)
            while not (letters := b.take(KIND)):
                assert time.monotonic() < end, "it never came"
                b.wait(0.1)
            assert torch.equal(letters[0].message.body, BODY)  # type: ignore[arg-type]
            b.folded(letters[0])
            generations.append(a._links.by_peer[1].generation)
        assert 1 < generations[0] <= 4, "at first the pieces were too long, and soon no more"
        assert generations[-1] <= generations[0] + 3, "pieces that were quick make the next ones too long once at most"
        assert a.members() == b.members() == (0, 1)


def test_pieces_are_halved_while_they_are_slow_and_doubled_while_they_are_quick() -> None:
    pieces = Pieces(4 << 20)

    def read(seconds: float) -> None:
        pieces.read(seconds, pieces.length, piece=pieces.length)

    read(0.1)
    assert pieces.length == 4 << 20, "never longer than the longest"
    read(5.0)
    assert pieces.length == 2 << 20
    read(1.0)
    assert pieces.length == 2 << 20, "that is what they should be"
    pieces.broke()
    assert pieces.length == 256 << 10
    for _ in range(5):
        pieces.broke()
    assert pieces.length == LEAST
    for _ in range(6):
        read(0.01)
    assert pieces.length == 4 << 20


def test_many_pieces_of_one_body_make_the_next_ones_twice_as_long_or_half_and_no_more() -> None:
    """Else a body that was cut off after some quick pieces would begin again in pieces that are too long for ever."""
    pieces = Pieces(4 << 20)
    pieces.length = LEAST
    for _ in range(10):
        pieces.read(0.1, LEAST, piece=LEAST)
    assert pieces.length == 2 * LEAST
    pieces.read(0.1, 5, piece=LEAST)  # a short end says nothing
    assert pieces.length == 2 * LEAST
    pieces.length = 1 << 20
    for _ in range(10):
        pieces.read(3.0, 1 << 20, piece=1 << 20)
    assert pieces.length == 1 << 19


def test_short_bounds_are_kept() -> None:
    pieces = Pieces(1000)
    pieces.broke()
    assert pieces.length == 1000
    with pytest.raises(ValueError, match="`fragment_bytes` must be at least 1, got 0"):
        Pieces(0)
