"""The receiver's half of a link: it waits for headers only, and never for a body that may be half on the wire.

DATA, short body        delivered
DATA, long body         receives posted into the box of its kind; only then is the header counted as seen: GOT
FRAGMENT k              its header came behind it, so it is here; after the last one: delivered
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_async.transport.gloo import Pending
from lightning_async.transport.header import (
    DATA,
    FRAGMENT,
    HEADER_BYTES,
    INLINE_BYTES,
    AnotherProtocolError,
    Header,
)
from lightning_async.transport.line import AHEAD, Line, Page
from lightning_async.transport.shared import BODY_TAG


@dataclass(slots=True)
class _Incoming:
    header: Header
    body: Tensor
    works: list[Pending]


class Receiver:
    """What the receiver thread of one link does."""

    def __init__(self, line: Line) -> None:
        self._line, self._slots = line, line.slots
        self._ahead: list[tuple[Page, Pending]] = []
        self._incoming: _Incoming | None = None

    def post_ahead(self) -> None:
        """Before the greeting: a header may follow it at once."""
        self._ahead = [self._line.expect(Page()) for _ in range(AHEAD)]

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
                line.seen += 1  # after the receives of an announced body are posted: that is what GOT says
                line.peer_seen = header.seen
                line.owe |= header.what in (DATA, FRAGMENT) and self._incoming is not None
                if line.owe or line.sending:
                    self._slots.changed.notify_all()
            self._ahead[turn] = line.expect(page)

    def forget(self) -> None:
        """The link is closed, and the thread gone."""
        self._ahead, self._incoming = [], None

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
            box.copy_(page.tensor[HEADER_BYTES : HEADER_BYTES + header.nbytes])
            self._slots.deliver(header, box)
            return
        if header.fragment < 1:
            raise AnotherProtocolError(f"member {self._slots.peer} cut a body into pieces of {header.fragment} bytes")
        wire, parts = self._line.running(), torch.split(box, header.fragment)
        self._incoming = _Incoming(header, box, [wire.receive(part, BODY_TAG) for part in parts])

    def receive_fragment(self, header: Header) -> None:
        """A piece of the announced body is here."""
        incoming = self._incoming
        if incoming is None or not 0 <= header.fragment < len(incoming.works):
            raise AnotherProtocolError(f"member {self._slots.peer} sent a fragment that it had not announced")
        incoming.works[header.fragment].wait()  # it is here: its header came behind it
        if header.fragment == len(incoming.works) - 1:
            self._incoming = None
            self._slots.deliver(incoming.header, incoming.body)
