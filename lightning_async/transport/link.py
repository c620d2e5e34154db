"""A link: one connection between two members, over a bare gloo group of these two, and its two threads.

      sender thread (A)                                   receiver thread (B)
      DATA  kind, number, nbytes [+ short body] --------> short body: delivered
      4 MiB of body, FRAGMENT 0 ------------------------>           into receives that stand at any time
      4 MiB of body, FRAGMENT 1 ------------------------>           (shorter on a slow network: `pieces`)
            <------------------------------------- GOT    (at most 2 fragments are not answered)
      ...                                                 the last FRAGMENT: delivered
            <------------------------------------- folded, in the next header of any kind: B has used it

Gloo tells neither a death nor a cancel to a transfer that is half on the wire: whoever waits on one waits for ever. So
the receiver thread waits only for headers, which are queued receives and fail within milliseconds, and the sender
thread only for a condition. A fragment is sent when its receive is known to be posted, hence before its FRAGMENT header
in the same stream; a send is waited on (a formality: gloo wants it) when the peer has `seen` a later header.

Two receives stand at any time, so no body waits for an answer before it begins: answers travel behind all that goes the
other way, on a slow link that is busy both ways about as long as a body.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from lightning_async.transport.gloo import Clients, Wire, agree
from lightning_async.transport.greeting import greet
from lightning_async.transport.header import AnotherProtocolError, run_number
from lightning_async.transport.line import Line
from lightning_async.transport.pieces import Pieces
from lightning_async.transport.receiver import Receiver
from lightning_async.transport.sender import Sender
from lightning_async.transport.shared import share
from lightning_async.transport.slots import Here, Slots, never, nothing

LOOK = 0.003
"""Seconds between looks for the other one before the rendezvous."""
PING = 0.5
"""Seconds after which a header is sent for its own sake: the wire is whole, and this is our step and our clock."""


class Link:
    """One connection; it opens itself in the background and never blocks the thread that made it.

    Attributes:
        since: When it came up; 0 before.
        error: Why it is dead, in words.
        refused: Whether that is because the peer is of another run, or speaks another protocol.
    """

    def __init__(
        self,
        clients: Clients,
        *,
        me: int,
        slots: Slots,
        here: Here,
        run: str,
        generation: int = 1,
        pieces: Pieces,
        connect_timeout: float = 30.0,
        interface: str | None = None,
        shared_memory: bool = True,
        news: Callable[[], None] = nothing,
    ) -> None:
        self.me, self.peer, self.generation = me, slots.peer, generation
        self.since = 0.0
        self.error: str | None = None
        self.refused = False
        self.line = Line(slots=slots, here=here, run=run_number(run), pieces=pieces)
        self.sender, self.receiver = Sender(self.line), Receiver(self.line)
        self._clients, self._slots, self._here = clients, slots, here
        self._timeout, self._interface, self._news = connect_timeout, interface, news
        self._shared_memory = shared_memory
        self._until = here.now() + connect_timeout
        self._sending = threading.Thread(target=self._send, name=f"link-{me}-{self.peer}-sender", daemon=True)
        self._receiving = threading.Thread(target=self._receive, name=f"link-{me}-{self.peer}-receiver", daemon=True)
        self._sending.start()

    @property
    def state(self) -> str:
        """`opening`, `up`, `dead` or `closed`."""
        return self.line.state

    # the sender thread, which opens the link first

    def _send(self) -> None:
        try:
            if self._open():
                while self.state == "up":
                    self._send_next()
        except (RuntimeError, ConnectionError, AnotherProtocolError) as error:
            self._fail(error)

    def _send_next(self) -> None:
        with self._slots.changed:
            job = self._slots.changed.wait_for(self.sender.next, PING)
            if self.line.writing:
                return
            self.line.writing = True
        try:
            (job or self.sender.ping)()
        finally:
            self._wrote()

    def _wrote(self) -> None:
        with self._slots.changed:
            self.line.writing = False
            if self.sender.waiting:
                self._slots.changed.notify_all()

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
            self.line.wire = wire
        self.receiver.post_ahead()
        greet(self.line, wire)
        way = share(wire, fragment=self.line.pieces.longest, wanted=self._shared_memory)
        self.receiver.stand(way)
        with self._slots.changed:
            if self.state != "opening":
                return False
            self.since = self._here.now()
            self.line.wire, self.line.state = way, "up"
            self._slots.write = self.write_now
            self._receiving.start()
        self._news()
        return True

    def _is_patient(self) -> bool:
        with self._slots.changed:
            self._slots.changed.wait_for(lambda: self.state != "opening", LOOK)
        return self.state == "opening" and self._here.now() < self._until

    # the receiver thread

    def _receive(self) -> None:
        try:
            self.receiver.run()
        except (RuntimeError, AnotherProtocolError) as error:
            self._fail(error)

    # whoever posts

    def write_now(self) -> bool:
        """Send the one short message that is queued, or what was folded, in this thread. False: the sender has to.

        What ends this thread in the middle, a signal for instance, may leave half of a header behind: then the link is
        made anew, and the greeting tells what has arrived.
        """
        job: Callable[[], None] | None = None
        error: Exception | None = None
        try:
            with self._slots.changed:
                job = self.sender.short()
                self.line.writing = self.line.writing or job is not None
            if job is not None:
                error = ConnectionError("a thread was interrupted while it wrote")
                job()
                error = None
        except (RuntimeError, ConnectionError, AnotherProtocolError) as broken:
            error = broken
        finally:
            if error is not None:
                self._fail(error)
            if job is not None:
                self._wrote()
        return job is not None

    # both

    def _fail(self, error: Exception) -> None:
        with self._slots.changed:
            if self.state in ("opening", "up"):
                self.line.state, self.error = "dead", f"link between members {self.me} and {self.peer}: {error}"
                self.refused = isinstance(error, AnotherProtocolError)
            self._slots.changed.notify_all()
        self._news()

    def close(self) -> bool:
        """Hang up, also in mid-transfer: True if both threads are gone. May be called often, from any thread.

        A thread that is still in the rendezvous cannot be called back: it ends with it, by itself, and leaves nothing.
        """
        with self._slots.changed:
            self.line.state = "closed"
            if self._slots.write == self.write_now:
                self._slots.write = never
            self._slots.changed.notify_all()
            wire = self.line.wire
        if wire is not None:
            wire.cancel()
        for thread in (self._sending, self._receiving):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(0.5 if wire is None else 5.0)
        with self._slots.changed:
            quiet = self._slots.changed.wait_for(lambda: not self.line.writing, 5.0)
        gone = quiet and not self._sending.is_alive() and not self._receiving.is_alive()
        if gone:
            self.line.wire = None
            self.sender.forget()
            self.receiver.forget()
        return gone
