"""Ranges of positions, as (first, amount): cut, united, sent; and the numbering of what is left of an order.

    order     0 1 2 3 4 5 6 7 8 9         done  [2..4] [7..8]
    rest      0 1       2 3     4         its numbers; number 5 is position 0 again

Who shares out a rest goes by its numbers, as if it were an order of its own. Positions are what is handed out, and what
is said to be done.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

Range = tuple[int, int]
"""The first position and how many follow from it on."""

PACKED = struct.Struct("<QI")
"""A range as bytes."""


class Rest:
    """The positions of an order that are not done, numbered 0, 1, 2, ...; past the last one it begins again.

    Args:
        span: How many of the order's first positions there are to do.
        done: The ranges that are done; they may overlap, and lie outside.
    """

    def __init__(self, span: int, done: Iterable[Range] = ()) -> None:
        self._ranges = uncovered(done, 0, span)
        self._starts = [0, *accumulate(amount for _, amount in self._ranges)]

    def __len__(self) -> int:
        return self._starts[-1]

    def position(self, number: int) -> int:
        """The position that has this number."""
        number %= len(self)
        k = bisect_right(self._starts, number) - 1
        return self._ranges[k][0] + number - self._starts[k]

    def positions(self, first: int, amount: int) -> Iterator[Range]:
        """The positions that have the `amount` numbers from `first` on."""
        while amount > 0:
            first %= len(self)
            k = bisect_right(self._starts, first) - 1
            size = min(amount, self._starts[k + 1] - first)
            yield self._ranges[k][0] + first - self._starts[k], size
            first, amount = first + size, amount - size


def cut(ranges: Sequence[Range], skip: int, amount: int) -> Iterator[Range]:
    """The part of concatenated `ranges` that begins after `skip` samples and is at most `amount` samples long."""
    for first, n in ranges:
        if amount <= 0:
            return
        begin = min(skip, n)
        skip -= begin
        size = min(n - begin, amount)
        if size > 0:
            amount -= size
            yield first + begin, size


def each(ranges: Iterable[Range]) -> list[int]:
    """The positions one by one."""
    return [p for first, amount in ranges for p in range(first, first + amount)]


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same positions in the same order, in fewer ranges."""
    found: list[Range] = []
    for first, amount in ranges:
        if found and sum(found[-1]) == first:
            found[-1] = (found[-1][0], found[-1][1] + amount)
        elif amount > 0:
            found.append((first, amount))
    return found


def united(ranges: Iterable[Range]) -> list[Range]:
    """The positions that any of the ranges covers, each once and in order."""
    ranges = list(ranges)
    holes = uncovered(ranges, 0, end := max((sum(r) for r in ranges), default=0))
    return uncovered(holes, 0, end)


def uncovered(ranges: Iterable[Range], begin: int, end: int) -> list[Range]:
    """The parts of positions `begin` .. `end`-1 that no range covers."""
    found = []
    for first, amount in sorted(ranges):
        if begin < min(first, end):
            found.append((begin, min(first, end) - begin))
        begin = max(begin, first + amount)
    return [*found, (begin, end - begin)] if begin < end else found


def pack_ranges(ranges: Iterable[Range]) -> bytes:
    """Ranges as bytes, for the board."""
    return b"".join(PACKED.pack(*pair) for pair in ranges)


def unpack_ranges(body: bytes) -> tuple[Range, ...]:
    """The reverse of `pack_ranges`."""
    return tuple((first, amount) for first, amount in PACKED.iter_unpack(body))
