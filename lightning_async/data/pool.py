"""Work that is given out by one counter of the board: tickets in, ranges of positions out, each to exactly one member.

    ranges of positions   [8 .. 1007]  or, of a dead member,  [40..47] [92..95]
    tickets                0 .. 999                            0 .. 11

An answer past the last ticket says that the pool is spent. Nobody hands a ticket back, so a member that has asked must
hear the answer before it goes.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_async.data.ranges import Range, cut
from lightning_async.transport.mail import Board


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
