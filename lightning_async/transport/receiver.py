"""The receiver's half of a link: it waits for headers only, and never for a body that may be half on the wire.

DATA, short body        delivered
DATA, long body         its first pieces come into the receives that stand; receives for the others are posted into the
                        box of its kind, behind those
FRAGMENT k              its header came behind it, so it is here; after the last one: delivered

    receives, in their order    stand stand | box box box | stand stand          `WINDOW` stand at any time, of the
    pieces, in theirs             0     1      2   3   4      0     1             longest length: what comes need not
                                  the last body's             the next one's      be announced and waited for

A receive that stood is posted again before the piece is counted as seen. So whoever has fewer than `WINDOW` unread
pieces on the wire finds a receive for the next one, of whatever body and length. What came into one is copied to its
place: two pieces of a body at most.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_async.transport.gloo import Connection, Pending, Standing
from lightning_async.transport.header import (
    DATA,
    FRAGMENT,
    HEADER_BYTES,
    INLINE_BYTES,
    AnotherProtocolError,
    Header,
)
from lightning_async.transport.line import AHEAD, WINDOW, Line, Page, bytes_of
from lightning_async.transport.shared import BODY_TAG


@dataclass(slots=True)
class _Incoming:
    """A long body on its way: its pieces in the box, those receives of theirs that do not stand, and how many came."""

    header: Header
    body: Tensor
    parts: tuple[Tensor, ...]
    works: list[Pending]
    read: int = 0


class Receiver:
    """What the receiver thread of one link does."""

    def __init__(self, line: Line) -> None:
        self._line, self._slots = line, line.slots
        self._ahead: list[tuple[Page, Pending]] = []
        self._standing: deque[tuple[Tensor, Standing]] = deque()
        self._incoming: _Incoming | None = None

    def post_ahead(self) -> None:
        """Before the greeting: a header may follow it at once."""
        self._ahead = [self._line.expect(Page()) for _ in range(AHEAD)]

    def stand(self, wire: Connection) -> None:
        """Before the first header is read: when its sender hears of that, it may send pieces."""
        for _ in range(WINDOW):
            self._stand(torch.empty(self._line.pieces.longest, dtype=torch.uint8), wire)

    def run(self) -> None:
        """Read headers until the link is closed; raises when the peer is gone or is another one."""
        line = self._line
        for turn in itertools.cycle(range(AHEAD)):
            page, work = self._ahead[turn]
            work.wait()
            if line.state != "up":
                return
            header = line.read(page)
            self._handle(header, page)
            with self._slots.changed:
                line.owe |= header.what == FRAGMENT or line.seen == 0
                line.seen += 1  # after a receive that stood stands again: that is what an answer says
                line.peer_seen = header.seen
                if line.owe or line.sending:
                    self._slots.changed.notify_all()
            self._ahead[turn] = line.expect(page)

    def forget(self) -> None:
        """The link is closed, and the thread gone."""
        self._ahead, self._incoming = [], None
        self._standing.clear()

    def _handle(self, header: Header, page: Page) -> None:
        self._slots.heard(header)
        if header.folded:
            self._slots.released(header.folded)
        self._line.count_in()
        if header.what == DATA:
            self._receive_message(header, page)
        elif header.what == FRAGMENT:
            self.receive_fragment(header)

    def _receive_message(self, header: Header, page: Page) -> None:
        box = self._slots.box(header)
        if header.nbytes <= INLINE_BYTES:
            if header.nbytes:
                bytes_of(box)[:] = page.view[HEADER_BYTES : HEADER_BYTES + header.nbytes]
            self._slots.deliver(header, box)
            return
        longest = self._line.pieces.longest
        if not 1 <= header.fragment <= longest:
            raise AnotherProtocolError(
                f"member {self._slots.peer} cut a body into pieces of {header.fragment} bytes, "
                f"where this one takes 1 to {longest}"
            )
        wire, parts = self._line.running(), torch.split(box, header.fragment)
        self._incoming = _Incoming(header, box, parts, [wire.receive(part, BODY_TAG) for part in parts[WINDOW:]])

    def receive_fragment(self, header: Header) -> None:
        """A piece of the body is here: its header came behind it."""
        incoming = self._incoming
        if incoming is None or header.fragment != incoming.read:
            raise AnotherProtocolError(f"member {self._slots.peer} sent a fragment out of turn")
        if incoming.read < WINDOW:
            buffer, standing = self._standing.popleft()
            standing.take(incoming.parts[incoming.read])
            self._stand(buffer, self._line.running())
        else:
            incoming.works[incoming.read - WINDOW].wait()
        incoming.read += 1
        if incoming.read == len(incoming.parts):
            self._incoming = None
            self._slots.deliver(incoming.header, incoming.body)

    def _stand(self, buffer: Tensor, wire: Connection) -> None:
        self._standing.append((buffer, wire.stand(buffer, BODY_TAG)))
