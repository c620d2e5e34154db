"""The sender's half of a link: what to send next, in which pieces, and when a send is over. It never waits on the wire.

    DATA --->  FRAGMENT 0 --->  FRAGMENT 1 --->   GOT <---  FRAGMENT 2 --->                    at most 2 not answered
    short body: in DATA  long body: a piece before each FRAGMENT header, into receives that stand (see `receiver`)

A header of any kind tells what was folded here and how far we have read. A send is waited on when the peer is known to
have read a later header: a formality that gloo wants, which takes no time then. Before any answer no piece is sent: the
peer's receives may not stand yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from lightning_async.transport.gloo import Pending
from lightning_async.transport.header import FOLDS, FRAGMENT, GOT, INLINE_BYTES, Header
from lightning_async.transport.line import AHEAD, HEAD_TAG, WINDOW, Line, Page
from lightning_async.transport.shared import BODY_TAG
from lightning_async.transport.slots import Slot, nothing


@dataclass(slots=True)
class Outgoing:
    """A long body on its way, and how many pieces of it are sent."""

    slot: Slot
    nbytes: int
    piece: int
    sent: int = 0


class Unread(NamedTuple):
    """A piece that was sent: the number of the header behind it, when, how many bytes, and its body's piece length."""

    header: int
    since: float
    nbytes: int
    piece: int


class Sender:
    """What the sender thread of one link does."""

    def __init__(self, line: Line) -> None:
        self.pages: list[Page] = []
        self.flying: deque[tuple[int, Page, Pending | None]] = deque()
        self._line, self._slots = line, line.slots
        self._sent = 0
        self._outgoing: Outgoing | None = None
        self._unread: deque[Unread] = deque()
        self._read = 0.0  # when the newest answer to any was read
        self._told = 0  # how far we had read by our last header

    def next(self) -> Callable[[], None] | None:
        """What to send next; called with the lock held. Whatever it is, it says what was folded and received too."""
        if self._line.state != "up":
            return nothing
        if self._line.writing:
            return None  # by whoever posted it; then it is told
        if self._outgoing is not None:
            if self._window_is_open():
                return partial(self.send_fragment, self._outgoing)
        elif self._slots.queue:
            return partial(self._send_message, self._slots.queue.popleft())
        return partial(self._send_header, Header(GOT)) if self._line.owe or self._slots.acks else None

    def short(self) -> Callable[[], None] | None:
        """The one message that is queued, if it fits into its header, or only what was folded; called with the lock
        held."""
        queue, line = self._slots.queue, self._line
        if line.state != "up" or line.writing or self._outgoing is not None or len(queue) > 1:
            return None
        if not queue:
            return partial(self._send_header, Header(GOT)) if self._slots.acks else None
        header = queue[0].header
        if header is None or header.nbytes > INLINE_BYTES:
            return None
        return partial(self._send_message, queue.popleft())

    @property
    def waiting(self) -> bool:
        """Whether there is something for the sender thread; called with the lock held."""
        line, slots = self._line, self._slots
        return line.state != "up" or bool(slots.queue or slots.acks or line.owe or self._outgoing)

    def ping(self) -> None:
        """A header for its own sake, unless the peer neither reads nor writes: then no more are piled up."""
        self._land()  # on an idle link nothing else tells that those of a peer that was frozen have arrived
        if len(self.flying) < AHEAD or self._told < self._line.seen:
            self._send_header(Header(GOT))

    def forget(self) -> None:
        """The link is closed, and the thread gone."""
        if self._outgoing is not None or self._unread:
            self._line.pieces.broke()
        self._outgoing, self.pages = None, []
        self.flying.clear()

    def _window_is_open(self) -> bool:
        self._look_what_was_read()
        return self._line.peer_seen > 0 and len(self._unread) < WINDOW

    def _look_what_was_read(self) -> None:
        """How long each piece took by itself: what was sent behind another had to wait for that one first."""
        read = [one for one in self._unread if one.header <= self._line.peer_seen]
        if not read:
            return
        now = self._line.here.now()
        seconds = (now - max(read[0].since, self._read)) / len(read)
        self._read = now
        for one in read:
            self._unread.popleft()
            self._line.pieces.read(seconds, one.nbytes, piece=one.piece)

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
            self._line.sending, header.fragment = True, min(self._line.pieces.length, self._line.room)
            self._send_header(header)
            self._outgoing = Outgoing(slot, header.nbytes, header.fragment)

    def send_fragment(self, outgoing: Outgoing) -> None:
        """The next piece of a long body, and its header behind it."""
        begin = outgoing.sent * outgoing.piece
        end = min(begin + outgoing.piece, outgoing.nbytes)
        body = outgoing.slot.view(outgoing.nbytes)[begin:end]
        work = self._line.running().send(body, BODY_TAG)
        self._send_header(Header(FRAGMENT, fragment=outgoing.sent), work=work)
        outgoing.sent += 1
        self._unread.append(Unread(self._sent, self._line.here.now(), end - begin, outgoing.piece))
        if end == outgoing.nbytes:
            self._outgoing, self._line.sending = None, False

    def _send_header(self, header: Header, *, inline: Tensor | None = None, work: Pending | None = None) -> None:
        page = self.pages.pop() if self.pages else Page()
        with self._slots.changed:
            header.seen, self._line.owe = self._line.seen, False
            header.folded = self._slots.told(FOLDS)
        self._told = header.seen
        self._line.write(page, header)
        message = page.short if inline is None or not inline.numel() else page.with_body(inline)
        self._sent += 1
        if work is not None:
            self.flying.append((self._sent, page, work))
        self.flying.append((self._sent, page, self._line.running().send(message, HEAD_TAG)))
        self._line.count_out()
        self._land()

    def _land(self) -> None:
        """Sends that the peer has seen are over: waiting for them takes no time, and only now may they be dropped."""
        self._look_what_was_read()
        while self.flying and self.flying[0][0] <= self._line.peer_seen:
            index, page, work = self.flying.popleft()
            if work is not None:
                work.wait()
            if not self.flying or self.flying[0][0] != index:
                self.pages.append(page)
