"""A greeting is how a link begins: both say HELLO, what they have received, what is not folded yet, and what they take.

    HELLO  received 7, not folded {5}  <-->  HELLO  received 3, not folded {}
    so message 8 is sent again if it was posted, 6 and 7 are free, 5 stays taken

It has a tag of its own, that no other header can be taken for it.
"""

from __future__ import annotations

import contextlib
import struct
from datetime import timedelta

from lightning_async.transport.gloo import Wire
from lightning_async.transport.header import HEADER_BYTES, HELLO, AnotherProtocolError, Header
from lightning_async.transport.line import HELLO_TAG, Line, Page

LAST_WORD = timedelta(seconds=1)
"""How long a stranger may take to read who we are, before we hang up."""


def greet(line: Line, wire: Wire) -> None:
    """Send ours, read the other's, and know the fate of each message posted before."""
    slots = line.slots
    mine, theirs = Page(), Page()
    answer = wire.receive(theirs.tensor, HELLO_TAG)
    received, unfolded = slots.hello()
    takes = line.pieces.longest
    line.write(mine, Header(HELLO, number=received, nbytes=slots.max_bytes, fragment=takes, reference=len(unfolded)))
    struct.pack_into(f"<{len(unfolded)}q", mine.view, HEADER_BYTES, *unfolded)
    greeting = wire.send(mine.tensor, HELLO_TAG)
    answer.wait()
    try:
        hello = line.read(theirs)
    except AnotherProtocolError:
        with contextlib.suppress(RuntimeError):
            greeting.wait(LAST_WORD)
        raise
    greeting.wait()
    slots.heard(hello)
    if hello.fragment < 1:
        raise AnotherProtocolError(f"member {slots.peer} takes pieces of {hello.fragment} bytes")
    line.room = hello.fragment
    numbers = struct.unpack_from(f"<{hello.reference}q", theirs.view, HEADER_BYTES)
    slots.resume(received=hello.number, unfolded=set(numbers), limit=hello.nbytes)
