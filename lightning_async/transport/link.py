"""A link: one connection between two members, over a bare gloo group of these two, and its two threads.

      sender thread (A)                                   receiver thread (B)
      DATA  kind, number, nbytes [+ short body] --------> short body: delivered
                                                          long body: receives posted into the box, then
            <------------------------------------- GOT
      4 MiB of body, FRAGMENT 0 ------------------------>
      4 MiB of body, FRAGMENT 1 ------------------------>
            <------------------------------------- GOT    (at most 2 fragments are not answered)
      ...                                                 the last FRAGMENT: delivered
            <------------------------------------- folded, in the next header of any kind: B has used it

Gloo tells neither a death nor a cancel to a transfer that is half on the wire: whoever waits on one waits for ever. So
the receiver thread waits only for headers, which are queued receives and fail within milliseconds, and the sender
thread only for a condition. A fragment is sent when its receive is known to be posted, hence before its FRAGMENT header
in the same stream; a send is waited on (a formality: gloo wants it) when the peer has `seen` a later header.

state: opening -> up -> dead (the peer is gone: `error`) | closed (by us)
"""

from __future__ import annotations

import contextlib
import itertools
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Work

from lightning_async.transport.gloo import Clients, Wire, agree
from lightning_async.transport.header import (
    DATA,
    FOLDS,
    FRAGMENT,
    GOT,
    HEADER_BYTES,
    HELLO,
    INLINE_BYTES,
    WIRE_BYTES,
    AnotherProtocolError,
    Header,
    pack_into,
    run_number,
    unpack,
)
from lightning_async.transport.slots import Here, Slot, Slots, nothing
from lightning_async.transport.traffic import HEADERS

HEAD_TAG, BODY_TAG, HELLO_TAG = 1, 2, 3
AHEAD = 8
"""Header receives that are always posted, so that a header leaves at once; more headers wait in their sender's gloo."""
WINDOW = 2
"""Fragments on the wire: one being written while the answer to the other travels; more would only delay answers."""

LOOK = 0.003
"""Seconds between looks for the other one before the rendezvous."""
PING = 0.5
"""Seconds after which a header is sent for its own sake: the wire is whole, and this is our step and our clock."""


@dataclass(slots=True)
class _Page:
    """A kept header on the wire, as gloo and as Python see it."""

    tensor: Tensor = field(default_factory=lambda: torch.zeros(WIRE_BYTES, dtype=torch.uint8))
    short: Tensor = field(init=False)
    view: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.short = self.tensor[:HEADER_BYTES]
        self.view = memoryview(self.tensor.numpy())  # type: ignore[arg-type]


@dataclass(slots=True)
class _Outgoing:
    """A long body on its way: what is sent, and which headers must be seen before more may be."""

    slot: Slot
    nbytes: int
    announced: int
    sent: int = 0
    trailers: deque[int] = field(default_factory=deque)


@dataclass(slots=True)
class _Incoming:
    header: Header
    body: Tensor
    works: list[Work]


class Link:
    """One connection; it opens itself in the background and never blocks the thread that made it."""

    def __init__(
        self,
        clients: Clients,
        *,
        me: int,
        slots: Slots,
        here: Here,
        run: str,
        generation: int = 1,
        fragment_bytes: int = 4 << 20,
        connect_timeout: float = 30.0,
        interface: str | None = None,
        news: Callable[[], None] = nothing,
    ) -> None:
        if fragment_bytes < 1:
            raise ValueError(f"`fragment_bytes` must be at least 1, got {fragment_bytes}")
        self.me, self.peer, self.generation = me, slots.peer, generation
        self.state = "opening"
        self.error: str | None = None
        self.refused = False
        self._clients, self._slots, self._here = clients, slots, here
        self._run, self._run_number = run, run_number(run)
        self._fragment, self._timeout, self._interface, self._news = fragment_bytes, connect_timeout, interface, news
        self._until = here.now() + connect_timeout
        self._wire: Wire | None = None
        self._pages: list[_Page] = []
        self._ahead: list[tuple[_Page, Work]] = []
        self._flying: deque[tuple[int, _Page, Work | None]] = deque()
        self._sent = self._seen = self._peer_seen = 0
        self._owe = False
        self._outgoing: _Outgoing | None = None
        self._incoming: _Incoming | None = None
        self._sender = threading.Thread(target=self._send, name=f"link-{me}-{self.peer}-sender", daemon=True)
        self._receiver = threading.Thread(target=self._receive, name=f"link-{me}-{self.peer}-receiver", daemon=True)
        self._sender.start()

    # opening

    def _open(self) -> bool:
        low, high = min(self.me, self.peer), max(self.me, self.peer)
        where = f"link/{low}-{high}/{self.generation}"
        rank = int(self.me == high)
        with self._clients.borrow() as keys:
            if not agree(keys, where, rank=rank, patient=self._is_patient):
                raise ConnectionError("one of the two did not come to the rendezvous, or left it")
            wire = Wire(keys, where, rank=rank, timeout=self._timeout, interface=self._interface)
        with self._slots.changed:
            if self.state != "opening":
                return False
            self._wire = wire
        self._ahead = [self._expect(_Page()) for _ in range(AHEAD)]
        self._greet(wire)
        with self._slots.changed:
            if self.state != "opening":
                return False
            self.state = "up"
            self._receiver.start()
        self._news()
        return True

    def _is_patient(self) -> bool:
        with self._slots.changed:
            self._slots.changed.wait_for(lambda: self.state != "opening", LOOK)
        return self.state == "opening" and self._here.now() < self._until

    def _greet(self, wire: Wire) -> None:
        """Both send HELLO and read the other's; it has a tag of its own, that no other header can be taken for it."""
        mine, theirs = _Page(), _Page()
        answer = wire.receive(theirs.tensor, HELLO_TAG)
        received, unfolded = self._slots.hello()
        header = Header(HELLO, number=received, nbytes=self._slots.max_bytes, reference=len(unfolded))
        self._date(header)
        pack_into(mine.view, header, run=self._run_number)
        struct.pack_into(f"<{len(unfolded)}q", mine.view, HEADER_BYTES, *unfolded)
        greeting = wire.send(mine.tensor, HELLO_TAG)
        answer.wait()
        try:
            hello = unpack(theirs.view, run=self._run_number)
        except AnotherProtocolError:
            with contextlib.suppress(RuntimeError):
                greeting.wait(timedelta(seconds=1))  # so that the peer can read who we are before we hang up
            raise
        greeting.wait()
        self._slots.heard(hello)
        numbers = struct.unpack_from(f"<{hello.reference}q", theirs.view, HEADER_BYTES)
        self._slots.resume(received=hello.number, unfolded=set(numbers), limit=hello.nbytes)

    # the sender thread

    def _send(self) -> None:
        try:
            if self._open():
                while self.state == "up":
                    with self._slots.changed:
                        job = self._slots.changed.wait_for(self._next, PING)
                    (job or self._ping)()
        except (RuntimeError, ConnectionError, AnotherProtocolError) as error:
            self._fail(error)

    def _next(self) -> Callable[[], None] | None:
        """What to send next; called with the lock held. Whatever it is, it says what was folded and received too."""
        if self.state != "up":
            return nothing
        if self._outgoing is not None:
            if self._window_is_open(self._outgoing):
                return partial(self._send_fragment, self._outgoing)
        elif self._slots.queue:
            return partial(self._send_message, self._slots.queue.popleft())
        return partial(self._send_header, Header(GOT)) if self._owe or self._slots.acks else None

    def _ping(self) -> None:
        if len(self._flying) < AHEAD:  # else the peer does not even read: do not pile up more
            self._send_header(Header(GOT))

    def _window_is_open(self, outgoing: _Outgoing) -> bool:
        while outgoing.trailers and outgoing.trailers[0] <= self._peer_seen:
            outgoing.trailers.popleft()
        return outgoing.announced <= self._peer_seen and len(outgoing.trailers) < WINDOW

    def _send_message(self, slot: Slot) -> None:
        header = slot.header
        if header is None:  # buried while it was queued
            return
        count = self._slots.count(header.kind)
        count.messages_out += 1
        count.bytes_out += header.nbytes
        if header.nbytes <= INLINE_BYTES:
            self._send_header(header, inline=slot.view(header.nbytes))
        else:
            self._send_header(header)
            self._outgoing = _Outgoing(slot, header.nbytes, announced=self._sent)

    def _send_fragment(self, outgoing: _Outgoing) -> None:
        begin = outgoing.sent * self._fragment
        end = min(begin + self._fragment, outgoing.nbytes)
        body = outgoing.slot.view(outgoing.nbytes)[begin:end]
        work = self._running().send(body, BODY_TAG)
        self._send_header(Header(FRAGMENT, fragment=outgoing.sent), work=work)
        outgoing.sent += 1
        outgoing.trailers.append(self._sent)
        if end == outgoing.nbytes:
            self._outgoing = None

    def _send_header(self, header: Header, *, inline: Tensor | None = None, work: Work | None = None) -> None:
        page = self._pages.pop() if self._pages else _Page()
        with self._slots.changed:
            header.seen, self._owe = self._seen, False
            header.folded = self._slots.told(FOLDS)
        self._date(header)
        pack_into(page.view, header, run=self._run_number)
        message = page.short
        if inline is not None and inline.numel():
            message = page.tensor[: HEADER_BYTES + inline.numel()]
            message[HEADER_BYTES:].copy_(inline)
        self._sent += 1
        if work is not None:
            self._flying.append((self._sent, page, work))
        self._flying.append((self._sent, page, self._running().send(message, HEAD_TAG)))
        count = self._slots.traffic[HEADERS]
        count.messages_out += 1
        count.bytes_out += HEADER_BYTES
        self._land()

    def _land(self) -> None:
        """Sends that the peer has seen are over: waiting for them takes no time, and only now may they be dropped."""
        while self._flying and self._flying[0][0] <= self._peer_seen:
            index, page, work = self._flying.popleft()
            if work is not None:
                work.wait()
            if not self._flying or self._flying[0][0] != index:
                self._pages.append(page)

    # the receiver thread

    def _receive(self) -> None:
        try:
            for turn in itertools.cycle(range(AHEAD)):
                page, work = self._ahead[turn]
                work.wait()
                if self.state != "up":
                    return
                header = unpack(page.view, run=self._run_number)
                self._handle(header, page)
                with self._slots.changed:
                    self._seen += 1  # after the receives of an announced body are posted: that is what GOT says
                    self._peer_seen = header.seen
                    self._owe |= header.what in (DATA, FRAGMENT) and self._incoming is not None
                    if self._owe or self._outgoing is not None:
                        self._slots.changed.notify_all()
                self._ahead[turn] = self._expect(page)
        except (RuntimeError, AnotherProtocolError) as error:
            self._fail(error)

    def _handle(self, header: Header, page: _Page) -> None:
        self._slots.heard(header)
        if header.folded:
            self._slots.released(header.folded)
        count = self._slots.traffic[HEADERS]
        count.messages_in += 1
        count.bytes_in += HEADER_BYTES
        if header.what == DATA:
            self._receive_message(header, page)
        elif header.what == FRAGMENT:
            self._receive_fragment(header)

    def _receive_message(self, header: Header, page: _Page) -> None:
        box = self._slots.box(header)
        if header.nbytes <= INLINE_BYTES:
            box.copy_(page.tensor[HEADER_BYTES : HEADER_BYTES + header.nbytes])
            self._slots.deliver(header, box)
            return
        wire, parts = self._running(), torch.split(box, self._fragment)
        self._incoming = _Incoming(header, box, [wire.receive(part, BODY_TAG) for part in parts])

    def _receive_fragment(self, header: Header) -> None:
        incoming = self._incoming
        if incoming is None or not 0 <= header.fragment < len(incoming.works):
            raise AnotherProtocolError(f"member {self.peer} sent a fragment that it had not announced")
        incoming.works[header.fragment].wait()  # it is here: its header came behind it
        if header.fragment == len(incoming.works) - 1:
            self._incoming = None
            self._slots.deliver(incoming.header, incoming.body)

    # both

    def _running(self) -> Wire:
        wire = self._wire
        if wire is None:
            raise RuntimeError("the link is closed")
        return wire

    def _expect(self, page: _Page) -> tuple[_Page, Work]:
        return page, self._running().receive(page.tensor, HEAD_TAG)

    def _date(self, header: Header) -> None:
        header.own_step, header.own_clock = self._here.step, self._here.nanoseconds()

    def _fail(self, error: Exception) -> None:
        with self._slots.changed:
            if self.state in ("opening", "up"):
                self.state, self.error = "dead", f"link between members {self.me} and {self.peer}: {error}"
                self.refused = isinstance(error, AnotherProtocolError)
            self._slots.changed.notify_all()
        self._news()

    def close(self) -> bool:
        """Hang up, also in mid-transfer: True if both threads are gone. May be called often, from any thread.

        A thread that is still in the rendezvous cannot be called back: it ends with it, by itself, and leaves nothing.
        """
        with self._slots.changed:
            self.state = "closed"
            self._slots.changed.notify_all()
            wire = self._wire
        if wire is not None:
            wire.cancel()
        for thread in (self._sender, self._receiver):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(0.5 if wire is None else 5.0)
        gone = not self._sender.is_alive() and not self._receiver.is_alive()
        if gone:
            self._wire, self._incoming, self._outgoing = None, None, None
            self._ahead, self._pages = [], []
            self._flying.clear()
        return gone
