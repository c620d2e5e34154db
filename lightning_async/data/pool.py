"""Work that is given out by one counter of the board: tickets in, ranges of positions out, each to exactly one member.

    ranges of positions   [8 .. 1007]  or, of a dead member,  [40..47] [92..95]
    tickets                0 .. 999                            0 .. 11

An answer past the last ticket says that the pool is spent. Nobody hands a ticket back, so a member that has asked must
hear the answer before it goes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_async.data.ledger import Range, cut
from lightning_async.transport.mail import Board

_HEAD = struct.Struct("<QQQ")
_SEAT = struct.Struct("<II")


class Pool:
    """One counter and the positions behind it.

    Args:
        board: Where the counter is.
        counter: Its name.
        ranges: The positions the tickets stand for.
    """

    def __init__(self, board: Board, counter: str, ranges: Sequence[Range]) -> None:
        self.counter = counter
        self.size = sum(amount for _, amount in ranges)
        self.asked = 0
        self.frontier = 0
        self._board = board
        self._ranges = tuple(ranges)

    @property
    def spent(self) -> bool:
        """Whether all tickets are known to be given out."""
        return self.frontier >= self.size

    @property
    def left(self) -> int:
        """Tickets that are neither known to be given out nor asked for by this member."""
        return max(0, self.size - self.frontier - self.asked)

    def ask(self, amount: int) -> None:
        """Draw `amount` tickets; `answers` brings them."""
        self.asked += amount
        self._board.draw(self.counter, amount)

    def answers(self) -> list[Range]:
        """The positions of the draws answered since the last call."""
        found: list[Range] = []
        for ticket, amount in self._board.drawn(self.counter):
            self.asked -= amount
            self.frontier = max(self.frontier, ticket + amount)
            found.extend(cut(self._ranges, ticket, amount))
        return found


@dataclass(frozen=True, slots=True)
class Opening:
    """What the first member to open an epoch decides for all: the order's fingerprint and everybody's first batch.

    Attributes:
        total: Positions in the order.
        used: How many of them are trained on; the rest is what `drop_last` drops.
        digest: The fingerprint of the order.
        seats: (rank, amount of its first range), in the order of the positions.
    """

    total: int
    used: int
    digest: int
    seats: tuple[Range, ...]

    @property
    def reserved(self) -> int:
        """Positions given out without a ticket."""
        return sum(amount for _, amount in self.seats)

    def first(self, rank: int) -> Range:
        """The range that is `rank`'s own without asking; empty for one who was not there at the opening."""
        begin = 0
        for seat, amount in self.seats:
            if seat == rank:
                return begin, amount
            begin += amount
        return begin, 0

    def pack(self) -> bytes:
        """As bytes, for the board."""
        return _HEAD.pack(self.total, self.used, self.digest) + b"".join(_SEAT.pack(*s) for s in self.seats)

    @staticmethod
    def unpack(value: bytes) -> Opening:
        """The reverse of `pack`."""
        seats = tuple((rank, amount) for rank, amount in _SEAT.iter_unpack(value[_HEAD.size :]))
        total, used, digest = _HEAD.unpack_from(value)
        return Opening(total, used, digest, seats)
