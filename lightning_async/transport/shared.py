"""Long bodies between two members of one host go through memory that both see, in place of the network.

      A                                                        B
      slot --copy--> [ place 0 | place 1 ] ------copy--> box of the kind         4 MiB each, one memory a direction
      FRAGMENT k ------------- gloo ------------------>  place k % 2 is read
            <----------------- gloo -------------- seen: place k % 2 may be written again

Headers, short bodies, deaths and cancels stay with gloo: whoever waits there is woken, and a dead peer is told within
milliseconds, as without. The protocol is the same, so a fragment is written only where the one before it was read.

The memory has no name: it is an anonymous file of the kernel, which each opens of the other through /proc, and knows by
a token. So nothing can be left behind in /dev/shm, whoever dies when; the last of the two that goes takes it along. Who
cannot open the other's, or stands in another network namespace (another host, or an emulated one), says so, and bodies
go over the network as ever.
"""

from __future__ import annotations

import mmap
import os
import secrets
from contextlib import suppress
from datetime import timedelta

import torch
from torch import Tensor

from lightning_async.transport.gloo import Connection, Pending, Standing

BODY_TAG, OFFER_TAG = 2, 4
PLACES = 2
"""As many fragments as may be on their way (`line.WINDOW`)."""
NONE = (0, 0, 0, 0, 0)


class Memory:
    """The places of one direction, as one of the two sees them.

    Args:
        file: The open file, as long as the memory.
        fragment: Bytes of a place.
    """

    def __init__(self, file: int, fragment: int) -> None:
        mapped = mmap.mmap(file, os.fstat(file).st_size)
        self._bytes = torch.frombuffer(mapped, dtype=torch.uint8).numpy()
        self._fragment = fragment
        self._count = 0

    def next(self) -> int:
        """Where the next fragment lies."""
        self._count += 1
        return (self._count - 1) % PLACES * self._fragment

    def write(self, body: Tensor) -> None:
        """Put the next fragment in its place."""
        at = self.next()
        self._bytes[at : at + body.numel()] = body.numpy()  # without the lock of the interpreter, and on one thread

    def read(self, at: int, body: Tensor) -> None:
        """Take a fragment from its place."""
        body.numpy()[:] = self._bytes[at : at + body.numel()]


class Written:
    """A send that is over: the body lies there."""

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        """Nothing to wait for."""
        return True


class Lying:
    """A body that will lie there when its header comes."""

    def __init__(self, memory: Memory, body: Tensor) -> None:
        self._memory, self._body, self._at = memory, body, memory.next()

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        """Take it; to be called when its header has come."""
        self._memory.read(self._at, self._body)
        return True

    def take(self, place: Tensor) -> None:
        """See `gloo.Standing`: it goes there at once."""
        self._memory.read(self._at, place)


class SharedBodies:
    """A wire of which long bodies take another way, in the directions in which that is possible.

    Args:
        wire: The wire.
        out: Where bodies to the peer go.
        into: Where its bodies come.
    """

    def __init__(self, wire: Connection, *, out: Memory | None, into: Memory | None) -> None:
        self._wire, self._out, self._into = wire, out, into

    def send(self, tensor: Tensor, tag: int) -> Pending:
        """See `gloo.Wire`."""
        if tag != BODY_TAG or self._out is None:
            return self._wire.send(tensor, tag)
        self._out.write(tensor)
        return Written()

    def receive(self, tensor: Tensor, tag: int) -> Pending:
        """See `gloo.Wire`."""
        return self._wire.receive(tensor, tag) if tag != BODY_TAG or self._into is None else Lying(self._into, tensor)

    def stand(self, buffer: Tensor, tag: int) -> Standing:
        """See `gloo.Wire`."""
        return self._wire.stand(buffer, tag) if tag != BODY_TAG or self._into is None else Lying(self._into, buffer)

    def cancel(self) -> None:
        """See `gloo.Wire`."""
        self._wire.cancel()


def share(wire: Connection, *, fragment: int, wanted: bool = True) -> Connection:
    """Offer memory to the other one, look at its own, and agree on each direction. Called by both, when they met."""
    offered = _made(PLACES * fragment) if wanted else None
    try:
        file, offer = offered or (-1, NONE)
        theirs = _exchanged(wire, offer)
        into = _opened(theirs, fragment) if wanted else None
        (welcome, *_) = _exchanged(wire, (int(into is not None), 0, 0, 0, 0))
        out = Memory(file, fragment) if offered is not None and welcome else None
    finally:
        if offered is not None:
            os.close(offered[0])
    return wire if out is None and into is None else SharedBodies(wire, out=out, into=into)


def _exchanged(wire: Connection, words: tuple[int, ...]) -> tuple[int, ...]:
    """Ours for theirs."""
    mine, theirs = torch.tensor(words, dtype=torch.int64), torch.zeros(len(words), dtype=torch.int64)
    answer, sent = wire.receive(theirs, OFFER_TAG), wire.send(mine, OFFER_TAG)
    answer.wait()
    sent.wait()
    return tuple(theirs.tolist())


def _made(size: int) -> tuple[int, tuple[int, int, int, int, int]] | None:
    """A file without a name that begins with a token, and what another process has to know to open it."""
    if not hasattr(os, "memfd_create"):
        return None
    with suppress(OSError):
        file = os.memfd_create("lightning_async")
        token = secrets.token_bytes(16)
        os.ftruncate(file, size + len(token))
        os.pwrite(file, token, size)
        first, second = (int.from_bytes(half, "little", signed=True) for half in (token[:8], token[8:]))
        return file, (os.getpid(), file, size, first, second)
    return None


def _opened(offer: tuple[int, ...], fragment: int) -> Memory | None:
    """The other one's memory, if it is on this host and as long as ours; the token tells it from any other file."""
    pid, file, size, *halves = offer
    token = b"".join(half.to_bytes(8, "little", signed=True) for half in halves)
    if not pid or size != PLACES * fragment:
        return None
    with suppress(OSError):
        if os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino:
            return None
        opened = os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
        try:
            right = os.fstat(opened).st_size == size + len(token) and os.pread(opened, len(token), size) == token
            return Memory(opened, fragment) if right else None
        finally:
            os.close(opened)
    return None
