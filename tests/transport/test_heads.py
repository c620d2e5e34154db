"""Headers between two of one host: each comes apart from the next and in order, and a death is told at once."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from lightning_async.transport import heads
from lightning_async.transport.header import HEADER_BYTES, WIRE_BYTES
from lightning_async.transport.heads import Heads, Near, meet, near
from lightning_async.transport.line import HEAD_TAG
from lightning_async.transport.shared import BODY_TAG, SharedBodies
from tests.transport.test_shared import ends, shared_by


def met() -> list[Heads | None]:
    """Both ends, over a wire in this process."""
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(meet, end, first=first) for end, first in zip(ends(), (True, False), strict=True)]
        return [call.result(10.0) for call in calls]


@pytest.fixture
def both() -> Iterator[tuple[Heads, Heads]]:
    a, b = met()
    assert a is not None
    assert b is not None
    yield a, b
    a.cancel()


def header(value: int, length: int = HEADER_BYTES) -> torch.Tensor:
    """Something to send."""
    return torch.full((length,), value, dtype=torch.uint8)


def test_each_comes_apart_from_the_next(both: tuple[Heads, Heads]) -> None:
    pages = [torch.zeros(WIRE_BYTES, dtype=torch.uint8) for _ in range(3)]
    for end, other in (both, both[::-1]):
        coming = [other.receive(page) for page in pages]
        for value, length in ((1, HEADER_BYTES), (2, WIRE_BYTES), (3, HEADER_BYTES + 1)):
            end.send(header(value, length)).wait()
        for value, length, page, one in zip((1, 2, 3), (HEADER_BYTES, WIRE_BYTES, 257), pages, coming, strict=True):
            one.wait()
            assert torch.equal(page[:length], header(value, length))


def test_what_finds_the_socket_full_goes_later_in_its_order(both: tuple[Heads, Heads]) -> None:
    """Nobody waits for a reader that is frozen; the next header of either direction brings the rest on its way."""
    a, b = both
    many = 20
    for value in range(many):
        a.send(header(value, WIRE_BYTES)).wait()
    page, mine = (torch.zeros(WIRE_BYTES, dtype=torch.uint8) for _ in range(2))
    for value in range(many):
        b.receive(page).wait()
        assert page[0] == value
        a.receive(mine)


@pytest.mark.parametrize("how", ["cancelled", "dead"])
def test_who_waits_is_told_of_the_end(how: str) -> None:
    a, b = met()
    assert a is not None
    assert b is not None
    page = torch.zeros(WIRE_BYTES, dtype=torch.uint8)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(b.receive(page).wait)
        if how == "cancelled":
            b.cancel()
        else:
            del a
        with pytest.raises(RuntimeError, match="socket"):
            waits.result(10.0)
    with pytest.raises(ConnectionError, match="socket"):
        b.send(header(1))


def test_who_does_not_know_the_word_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else of this host who has seen the name."""
    strangers: list[socket.socket] = []
    listening = heads._listening

    def watched(secret: bytes) -> Any:
        listener = listening(secret)
        assert listener is not None
        strangers.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        strangers[0].connect(listener.getsockname())
        strangers[0].send(b"x" * heads.HALF)
        return listener

    monkeypatch.setattr(heads, "_listening", watched)
    a, b = met()
    assert a is not None
    assert b is not None
    a.send(header(7))
    page = torch.zeros(WIRE_BYTES, dtype=torch.uint8)
    b.receive(page).wait()
    assert page[0] == 7
    assert strangers[0].recv(1) == b""
    strangers[0].close()


@pytest.mark.parametrize("fault", ["_listening", "_connected", "_accepted"])
def test_where_it_cannot_be_headers_go_by_the_wire(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(heads, fault, lambda *_: None)
        assert met() == [None, None]
    assert len(os.listdir("/proc/self/fd")) == before


def test_only_where_bodies_go_through_memory_both_ways() -> None:
    a, b, mine, theirs = shared_by()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(near, way, end, first=way is mine) for way, end in ((mine, a), (theirs, b))]
        there, here = (call.result(10.0) for call in calls)
    assert isinstance(there, Near)
    carried = len(a.carried)
    there.send(header(5), HEAD_TAG)
    there.send(torch.ones(8, dtype=torch.uint8), BODY_TAG)
    assert len(a.carried) == carried
    page = torch.zeros(WIRE_BYTES, dtype=torch.uint8)
    here.receive(page, HEAD_TAG).wait()
    assert page[0] == 5
    assert near(a, a, first=True) is a
    half = SharedBodies(a, out=mine.out, into=None)
    assert near(half, a, first=True) is half
    there.cancel()
