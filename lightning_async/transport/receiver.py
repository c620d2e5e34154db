"""The receiver's half of a link: it waits for headers only, and never for a body that may be half on the wire.

DATA, short body        delivered
DATA, long body         receives posted into the box of its kind; only then is the header counted as seen: GOT;
                        or they stand there since the last one of its kind was folded (`standing`)
FRAGMENT k              its header came behind it, so it is here; after the last one: delivered
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
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
from lightning_async.transport.standing import TAG


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
        self._standing: dict[int, tuple[Tensor, list[Pending]]] = {}

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
            answer = self._handle(header, page)
            with self._slots.changed:
                line.seen += 1  # after the receives of an announced body are posted: that is what GOT says
                line.peer_seen = header.seen
                line.owe |= answer
                if line.owe or line.sending:
                    self._slots.changed.notify_all()
            self._ahead[turn] = line.expect(page)

    def forget(self) -> None:
        """The link is closed, and the thread gone."""
        self._ahead, self._incoming = [], None
        self._standing.clear()

    def stand(self, numbers: Iterable[int]) -> None:
        """These messages were folded: receive the next ones of their kinds. In the sender thread, before it tells."""
        for number in numbers:
            if (one := self._line.come.folded(number)) is not None:
                kind, fragments = one
                box = self._slots.spare(kind, fragments * self._line.fragment)
                self._standing[kind] = box, self._receives(box, TAG + kind)

    def _handle(self, header: Header, page: Page) -> bool:
        """Whether the sender waits for an answer: before its body may come, or more of it."""
        self._slots.heard(header)
        if header.folded:
            for number in header.folded:
                self._line.there.folded(number)
            self._slots.released(header.folded)
        self._line.count_in()
        if header.what == DATA:
            return self._receive_message(header, page)
        if header.what == FRAGMENT:
            self.receive_fragment(header)
        return header.what == FRAGMENT

    def _receive_message(self, header: Header, page: Page) -> bool:
        if header.nbytes <= INLINE_BYTES:
            box = self._slots.box(header)
            box.copy_(page.tensor[HEADER_BYTES : HEADER_BYTES + header.nbytes])
            self._slots.deliver(header, box)
            return False
        box = self._slots.box(header, room=self._line.come.room(header.nbytes))
        stands = self._line.come.claim(header.kind, header.nbytes)
        works = self._standing.pop(header.kind)[1] if stands else self._receives(box, BODY_TAG)
        self._line.come.carried(header.number, header.kind, header.nbytes)
        self._incoming = _Incoming(header, box, works)
        return not stands

    def _receives(self, box: Tensor, tag: int) -> list[Pending]:
        wire = self._line.running()
        return [wire.receive(part, tag) for part in torch.split(box, self._line.fragment)]

    def receive_fragment(self, header: Header) -> None:
        """A piece of the announced body is here."""
        incoming = self._incoming
        if incoming is None or not 0 <= header.fragment < len(incoming.works):
            raise AnotherProtocolError(f"member {self._slots.peer} sent a fragment that it had not announced")
        incoming.works[header.fragment].wait()  # it is here: its header came behind it
        if header.fragment == len(incoming.works) - 1:
            self._incoming = None
            self._slots.deliver(incoming.header, incoming.body)
