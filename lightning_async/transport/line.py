"""A line is what the threads of a link share: the wire, how far each side has read, and whether an answer is owed.

    who writes        headers written 1 2 3 4 5 6     what is up to `peer_seen` has arrived: its pages are free again
    receiver thread   headers read    1 2 3 4         said in every header that goes back: `seen`; at once if `owe`

All change it under the lock of the slots, whose condition the sender thread waits on. One thread writes at a time: the
link's sender thread, or whoever posts a short message that somebody waits for.

state: opening -> up -> dead (the peer is gone: `error`) | closed (by us)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_async.transport.gloo import Connection, Pending
from lightning_async.transport.header import HEADER_BYTES, WIRE_BYTES, Header, pack_into, unpack
from lightning_async.transport.pieces import Pieces
from lightning_async.transport.shared import PLACES
from lightning_async.transport.slots import Here, Slots
from lightning_async.transport.traffic import HEADERS

HEAD_TAG, HELLO_TAG = 1, 3
AHEAD = 8
"""Header receives that are always posted, so that a header leaves at once; more headers wait in their sender's gloo."""
WINDOW = PLACES
"""Fragments on the wire that are not read yet, of whatever bodies: so many receives stand for them at the other end."""


@dataclass(slots=True)
class Page:
    """A kept header on the wire, as gloo and as Python see it; short bodies are copied as Python's bytes, which costs a
    quarter of the same with tensors."""

    tensor: Tensor = field(default_factory=lambda: torch.zeros(WIRE_BYTES, dtype=torch.uint8))
    short: Tensor = field(init=False)
    view: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.short = self.tensor[:HEADER_BYTES]
        self.view = bytes_of(self.tensor)

    def with_body(self, body: Tensor) -> Tensor:
        """The header with a short body behind it, to be sent."""
        end = HEADER_BYTES + body.numel()
        self.view[HEADER_BYTES:end] = bytes_of(body)
        return self.tensor[:end]


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor of bytes as Python sees it."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]


class Line:
    """One connection's state.

    Args:
        slots: What the two members owe each other.
        here: This member as its headers describe it.
        run: The run's number: a header of another run is refused.
        pieces: The length of the fragments in which a long body travels.

    Attributes:
        state: See above.
        seen: Headers read here.
        peer_seen: Headers of ours that the peer has read, as far as it told.
        owe: Whether the peer waits for a header of ours.
        sending: Whether a long body is on its way to the peer.
        writing: Whether a thread is sending; one at a time.
        room: The longest fragment that the peer takes.
    """

    def __init__(self, *, slots: Slots, here: Here, run: int, pieces: Pieces) -> None:
        self.slots, self.here, self.pieces = slots, here, pieces
        self.state = "opening"
        self.wire: Connection | None = None
        self.seen = self.peer_seen = 0
        self.owe = self.sending = self.writing = False
        self.room = pieces.longest
        self._run = run

    def running(self) -> Connection:
        """The wire, as long as there is one."""
        wire = self.wire
        if wire is None:
            raise RuntimeError("the link is closed")
        return wire

    def expect(self, page: Page) -> tuple[Page, Pending]:
        """Post the receive of a header."""
        return page, self.running().receive(page.tensor, HEAD_TAG)

    def write(self, page: Page, header: Header) -> None:
        """Put a header on a page, with this member's step and clock."""
        header.own_step, header.own_clock = self.here.step, self.here.nanoseconds()
        pack_into(page.view, header, run=self._run)

    def read(self, page: Page) -> Header:
        """The header on a page."""
        return unpack(page.view, run=self._run)

    def count_out(self) -> None:
        """A header left."""
        count = self.slots.traffic[HEADERS]
        count.messages_out += 1
        count.bytes_out += HEADER_BYTES

    def count_in(self) -> None:
        """A header came."""
        count = self.slots.traffic[HEADERS]
        count.messages_in += 1
        count.bytes_in += HEADER_BYTES
