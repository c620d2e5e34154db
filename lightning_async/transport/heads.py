"""Headers between two members of one host go over a local socket: no thread is woken but the one that reads.

    gloo        a receive is announced to the other end, a send waits for that: each wakes gloo's own thread there
    socket      one call at each end, and each message comes apart from the next

Deaths are told as by gloo: a socket whose other end is gone fails in whatever thread waits on it. It has no file: its
name is known to the kernel alone, and who connects must say a secret word that went by the wire. Only those use it
whose bodies go through memory, both ways: a fragment must be there when its header comes.

A socket that is full (its reader is frozen) takes no more. What is behind waits here, in order, for the next header of
either direction, which is a ping at the latest.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections import deque
from contextlib import suppress
from datetime import timedelta

from torch import Tensor

from lightning_async.transport.gloo import Connection, Pending
from lightning_async.transport.header import WIRE_BYTES
from lightning_async.transport.line import HEAD_TAG, bytes_of
from lightning_async.transport.shared import (
    NONE,
    Memory,
    SharedBodies,
    Written,
    bytes_of_words,
    exchanged,
    words_of,
)

FLAGS = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)
HALF = 16
"""Bytes of the name, and of the word behind it."""


class Heads:
    """One end of the socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._lock = threading.Lock()
        self._behind: deque[bytes] = deque()
        self._coming: dict[int, _Coming] = {}

    def send(self, tensor: Tensor) -> Pending:
        """Send it, or keep a copy for later."""
        body = bytes_of(tensor)
        with self._lock:
            if not self._go_on() or not self._goes(body):
                self._behind.append(bytes(body))
        return Written()

    def receive(self, tensor: Tensor) -> Pending:
        """What comes next but for those that were asked for before; the same few tensors, again and again."""
        if self._behind:
            with self._lock:
                self._go_on()
        coming = self._coming.get(id(tensor))
        if coming is None:
            coming = self._coming[id(tensor)] = _Coming(self._end, tensor)
        return coming

    def cancel(self) -> None:
        """Whoever waits at either end is told."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        self._end.close()  # not sooner: a thread may be about to read, and the number would be another file's

    def _go_on(self) -> bool:
        while self._behind:
            if not self._goes(self._behind[0]):
                return False
            self._behind.popleft()
        return True

    def _goes(self, body: memoryview | bytes) -> bool:
        try:
            self._end.send(body, FLAGS)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionError(f"the socket is broken: {error}") from error
        return True


class _Coming:
    """A header that is to be read into this tensor."""

    def __init__(self, end: socket.socket, tensor: Tensor) -> None:
        self._end, self._place = end, bytes_of(tensor)

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        """Until it is here."""
        try:
            length = self._end.recv_into(self._place)
        except OSError as error:
            raise RuntimeError(f"the socket is broken: {error}") from error
        if not length:
            raise RuntimeError("the other end of the socket is closed")
        return True


class Near(SharedBodies):
    """A wire whose long bodies go through memory, both ways, and whose headers go over a socket."""

    def __init__(self, wire: Connection, *, out: Memory | None, into: Memory | None, heads: Heads) -> None:
        super().__init__(wire, out=out, into=into)
        self._heads = heads

    def send(self, tensor: Tensor, tag: int) -> Pending:
        """See `gloo.Wire`."""
        return self._heads.send(tensor) if tag == HEAD_TAG else super().send(tensor, tag)

    def receive(self, tensor: Tensor, tag: int) -> Pending:
        """See `gloo.Wire`."""
        return self._heads.receive(tensor) if tag == HEAD_TAG else super().receive(tensor, tag)

    def cancel(self) -> None:
        """See `gloo.Wire`."""
        self._heads.cancel()
        super().cancel()


def near(way: Connection, wire: Connection, *, first: bool) -> Connection:
    """The way with a socket for headers, where bodies go through memory. Called by both; one of them is the `first`."""
    if not isinstance(way, SharedBodies) or way.out is None or way.into is None:
        return way
    heads = meet(wire, first=first)
    return way if heads is None else Near(wire, out=way.out, into=way.into, heads=heads)


def meet(wire: Connection, *, first: bool) -> Heads | None:
    """Make a socket with the other one, who calls it too. None: it cannot be."""
    secret = secrets.token_bytes(32)
    listener = _listening(secret) if first else None
    try:
        flag, *words = exchanged(wire, (1, *words_of(secret)) if listener else NONE)
        end = _connected(bytes_of_words(words)) if flag and not first else None
        (there, *_) = exchanged(wire, (int(end is not None), 0, 0, 0, 0))
        end = _accepted(listener, secret) if listener and there else end
        (good, *_) = exchanged(wire, (int(end is not None), 0, 0, 0, 0))
    finally:
        if listener is not None:
            listener.close()
    if end is not None and not good:
        end.close()
    return Heads(end) if end is not None and good else None


def _name(secret: bytes) -> bytes:
    return b"\0lightning_async-" + secret[:HALF].hex().encode()


def _listening(secret: bytes) -> socket.socket | None:
    with suppress(OSError, AttributeError):  # of systems that have no such sockets
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(_name(secret))
            listener.listen()
            return listener
        except OSError:
            listener.close()
    return None


def _connected(secret: bytes) -> socket.socket | None:
    with suppress(OSError, AttributeError):
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            end.connect(_name(secret))
            end.send(secret[HALF:], FLAGS)
            return _wide(end)
        except OSError:
            end.close()
    return None


def _accepted(listener: socket.socket, secret: bytes) -> socket.socket | None:
    """The one that knows the word; it has connected already."""
    listener.setblocking(False)
    with suppress(OSError):
        while True:
            end, _ = listener.accept()
            end.setblocking(True)
            with suppress(OSError):
                if secrets.compare_digest(end.recv(len(secret), FLAGS), secret[HALF:]):
                    return _wide(end)
            end.close()
    return None


def _wide(end: socket.socket) -> socket.socket | None:
    """It, if it takes a header of any length."""
    if end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 2 * WIRE_BYTES:
        return end
    end.close()
    return None
