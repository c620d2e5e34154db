"""A member's note has pages, so that several rooms can each let the others know something of their own.

    note    | page 0: length, bytes | page 1: length, bytes |        one value a member, with every heartbeat

Each room gets a desk of its own, which is the carrier in all but its note.
"""

from __future__ import annotations

import struct

from lightning_async.transport.mail import Carrier

_LENGTH = struct.Struct("<H")
ABSENT = 0xFFFF
"""The length of a page on which nothing was ever written."""


def bind(pages: list[bytes | None]) -> bytes:
    """All pages as one note."""
    return b"".join(_LENGTH.pack(ABSENT) if page is None else _LENGTH.pack(len(page)) + page for page in pages)


def page_of(note: bytes, number: int) -> bytes | None:
    """One page of a note; None if nothing was ever written on it."""
    begin, length = 0, ABSENT
    for _ in range(number + 1):
        begin += 0 if length == ABSENT else length
        if begin + _LENGTH.size > len(note):
            return None
        (length,) = _LENGTH.unpack_from(note, begin)
        begin += _LENGTH.size
    return None if length == ABSENT else note[begin : begin + length]


class Pages:
    """The pages of one member's note.

    Args:
        carrier: Where the note is published.
        count: How many pages.
    """

    def __init__(self, carrier: Carrier, count: int) -> None:
        self.carrier = carrier
        self._pages: list[bytes | None] = [None] * count

    def desk(self, number: int) -> Desk:
        """The board and who is there, with the page of this number for a note."""
        if not 0 <= number < len(self._pages):
            raise ValueError(f"`number` must be from 0 to {len(self._pages) - 1}, got {number}")
        return Desk(self, number)

    def write(self, number: int, page: bytes, *, soon: bool = False) -> None:
        """Replace a page."""
        self._pages[number] = page
        self.carrier.publish(bind(self._pages), soon=soon)

    def read(self, number: int) -> dict[int, bytes]:
        """The newest known page of every member that wrote one."""
        found = {rank: page_of(note, number) for rank, note in self.carrier.notes().items()}
        return {rank: page for rank, page in found.items() if page is not None}


class Desk:
    """The board as one room sees it: what it publishes is its page of the member's note."""

    def __init__(self, pages: Pages, number: int) -> None:
        self._pages, self._number, self._carrier = pages, number, pages.carrier

    @property
    def me(self) -> int:
        """This member's rank."""
        return self._carrier.me

    def members(self) -> tuple[int, ...]:
        """The ranks not declared dead."""
        return self._carrier.members()

    def live(self) -> tuple[int, ...]:
        """The members heard of lately."""
        return self._carrier.live()

    def now(self) -> float:
        """Seconds on this member's clock."""
        return self._carrier.now()

    def propose(self, key: str, value: bytes) -> None:
        """Write `value` unless the key has one already."""
        self._carrier.propose(key, value)

    def decided(self, key: str) -> bytes | None:
        """The value of `key`, or None."""
        return self._carrier.decided(key)

    def forget(self, key: str, *, gone: bool = False) -> None:
        """This member asks for this decision no more; `gone`: nor does any other."""
        self._carrier.forget(key, gone=gone)

    def draw(self, counter: str, amount: int) -> None:
        """Ask for the next tickets of a counter."""
        self._carrier.draw(counter, amount)

    def drawn(self, counter: str) -> list[tuple[int, int]]:
        """The answers to this member's draws."""
        return self._carrier.drawn(counter)

    def publish(self, note: bytes, *, soon: bool = False) -> None:
        """Replace this room's page."""
        self._pages.write(self._number, note, soon=soon)

    def notes(self) -> dict[int, bytes]:
        """The newest known page of every member."""
        return self._pages.read(self._number)
