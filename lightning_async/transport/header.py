"""The header of everything that goes over a link: 32 integers of 64 bits, then at most 64 KiB of body.

    byte 0                                     256                        65792
         | magic protocol run what kind ... seen | inline body, as long as needed |

The layout is fixed and no pickle is ever read, so two hosts understand each other or say at once that they do not. Each
header, whatever it says, also carries how many headers its sender has received (`seen`), the numbers of messages that
its sender has folded, its step and its clock: that is how sends are known to be done, slots to be free and mail is
dated, mostly without a header of its own.

Magic, protocol version and run are the first three words for ever: a header of another version is read far enough to
turn its sender away in words.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

import torch

from lightning_async.transport.checks import DTYPES

MAGIC: Final = 0x4C41_4D41_494C_0001
PROTOCOL: Final = 5
WORDS: Final = 32
HEADER_BYTES: Final = 8 * WORDS
INLINE_BYTES: Final = 65536
"""Longer bodies travel in fragments: four headers a message in place of two, but no copy through a page."""
WIRE_BYTES: Final = HEADER_BYTES + INLINE_BYTES

HELLO: Final = 1
"""First on every link: who I am, what I have received, the longest body and the longest fragment that I take."""
DATA: Final = 2
"""A message; its body follows in the header, or in fragments."""
FRAGMENT: Final = 3
"""The fragment before this header is complete."""
GOT: Final = 4
"""Nothing but what every header says: the window may move on, a slot is free."""

NO_BODY: Final = 0
_CODES: Final = {dtype: code for code, dtype in enumerate(DTYPES, start=1)}
_FIELDS: Final = (
    "what",
    "kind",
    "number",
    "step",
    "version",
    "echo",
    "echo_clock",
    "samples",
    "weight",
    "reference",
    "dtype",
    "nbytes",
    "fragment",
    "seen",
    "own_step",
    "own_clock",
)
FOLDS: Final = WORDS - 3 - len(_FIELDS)
"""So many numbers of folded messages fit into a header."""
_BLANK: Final = (0,) * FOLDS
_values: Final = attrgetter(*_FIELDS)
_LAYOUT: Final = struct.Struct(f"<{WORDS}q")


@dataclass(slots=True)
class Header:
    """What one header says. Clocks are nanoseconds of the clock of the member that they belong to.

    Attributes:
        what: HELLO, DATA, ...
        kind: The kind of the message that this is about.
        number: The number of that message on this link.
        step: The message's own `step`; `version`, `samples`, `weight` and `reference` likewise.
        version: See `step`.
        echo: The receiver's step that the message refers to.
        echo_clock: The receiver's clock as its sender had last heard it when the message was posted.
        samples: See `step`.
        weight: See `step`.
        reference: See `step`.
        dtype: Code of the body's dtype; `NO_BODY` for a message without one.
        nbytes: Length of the whole body.
        fragment: Index of the fragment that this header ends; of a message, the length of the fragments of its body; of
            a greeting, the longest that its sender takes.
        seen: How many headers the sender of this one has received on this connection.
        own_step: The sender's step now.
        own_clock: The sender's clock now.
        folded: Numbers of messages that were used here: their slots are free.
    """

    what: int
    kind: int = 0
    number: int = 0
    step: int = 0
    version: int = 0
    echo: int = 0
    echo_clock: int = 0
    samples: int = 0
    weight: int = 0
    reference: int = 0
    dtype: int = NO_BODY
    nbytes: int = 0
    fragment: int = 0
    seen: int = 0
    own_step: int = 0
    own_clock: int = 0
    folded: tuple[int, ...] = ()


class AnotherProtocolError(ValueError):
    """The other end does not speak as we do, or speaks of another run."""


def run_number(run: str) -> int:
    """The run's name as one word: two runs have the same with a chance of 2**-63."""
    return int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little") >> 1


def pack_into(buffer: memoryview, header: Header, *, run: int) -> None:
    """Write `header` to the first bytes of `buffer`. A number that needs more than 64 bits is a ValueError."""
    blank = _BLANK[len(header.folded) :]
    try:
        _LAYOUT.pack_into(buffer, 0, MAGIC, PROTOCOL, run, *_values(header), *header.folded, *blank)
    except struct.error as error:
        raise ValueError(f"every number of a message must fit in 64 bits, got {header}") from error


def unpack(buffer: memoryview, *, run: int) -> Header:
    """Read a header; AnotherProtocolError says whose fault it is if it is not one of ours."""
    magic, protocol, other, *values = _LAYOUT.unpack_from(buffer, 0)
    if magic != MAGIC:
        raise AnotherProtocolError("what answers at this address is not lightning_async (wrong first word of a header)")
    if protocol != PROTOCOL:
        raise AnotherProtocolError(
            f"the peer speaks version {protocol} of the protocol and this member version {PROTOCOL}: "
            "install the same version of lightning_async on all nodes"
        )
    if other != run:
        raise AnotherProtocolError(
            f"the peer belongs to another run (run number {other:#x}, ours is {run:#x}): "
            "give each run its own rendezvous, or all members of one run the same run id"
        )
    header = Header(*values[: len(_FIELDS)])
    if values[len(_FIELDS)]:  # they stand at the front
        header.folded = tuple(filter(None, values[len(_FIELDS) :]))
    return header


def dtype_code(dtype: torch.dtype | None) -> int:
    """The code under which bodies of this dtype travel; None (no body) has one too."""
    if dtype is None:
        return NO_BODY
    code = _CODES.get(dtype)
    if code is None:
        known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"a message's body must have one of the dtypes {known}, got {dtype}")
    return code


def dtype_of(code: int) -> torch.dtype | None:
    """The dtype of a code; AnotherProtocolError if there is no such code."""
    if code == NO_BODY:
        return None
    if not 1 <= code <= len(DTYPES):
        raise AnotherProtocolError(f"the peer sent a body of dtype code {code}, which is not known here")
    return DTYPES[code - 1]
