"""The law of the data: every position of an epoch is completed exactly once.

A member claims ranges of positions, is handed them in the order of claiming, and completes them in the same order. So
one number says which of its samples are trained on:

    claims      [40..47] [80..95] [120..127]      in the order of claiming
    completed   ############ ..                   a prefix of them
    unfinished               [92..95] [120..127]  the rest, which somebody else takes over if this member dies

`audit` compares the ledgers of an epoch with what the law says. Nothing here knows a board, a clock or a process.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from lightning_async.data.ranges import PACKED, Range, cut, pack_ranges, unpack_ranges

NOTE_BYTES = 1024
"""What a board takes as a note."""

_HEADER = struct.Struct("<IIfBQQQH")
_ROOM = (NOTE_BYTES - _HEADER.size) // PACKED.size


class Ledger:
    """The claims of one member in one epoch and how many samples of them are completed.

    Args:
        epoch: The epoch the claims belong to.
    """

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch
        self.claims: list[Range] = []
        self.claimed = 0
        self.completed = 0
        self._head = 0
        self._before = 0

    def claim(self, first: int, amount: int) -> None:
        """Enter a range as this member's own; a range that continues the last one is joined to it."""
        if amount <= 0:
            return
        self.claimed += amount
        if self.claims and sum(self.claims[-1]) == first:
            self.claims[-1] = (self.claims[-1][0], self.claims[-1][1] + amount)
        else:
            self.claims.append((first, amount))

    def complete(self, amount: int) -> None:
        """Count the next `amount` claimed samples as trained on."""
        if not 0 <= amount <= self.outstanding:
            raise ValueError(f"{amount} samples cannot be completed: only {self.outstanding} are claimed and open")
        self.completed += amount
        # The last claim is kept at hand even when it is finished: it may still grow.
        while self._head < len(self.claims) - 1 and self._before + self.claims[self._head][1] <= self.completed:
            self._before += self.claims[self._head][1]
            self._head += 1

    @property
    def outstanding(self) -> int:
        """Samples claimed and not completed."""
        return self.claimed - self.completed

    def unfinished(self) -> list[Range]:
        """The ranges claimed and not completed, in the order of claiming."""
        return list(cut(self.claims[self._head :], self.completed - self._before, self.outstanding))

    def done(self) -> list[Range]:
        """The ranges completed, in the order of claiming."""
        return list(cut(self.claims, 0, self.completed))

    def ahead(self, skip: int, amount: int) -> list[Range]:
        """The ranges of `amount` samples, after skipping `skip` of those not completed."""
        return list(cut(self.claims[self._head :], self.completed - self._before + skip, amount))


@dataclass(frozen=True, slots=True)
class Note:
    """What a member lets the others know of its ledger: the claims of a whole epoch are many, the unfinished ones few.

    Attributes:
        epoch: The epoch it speaks of.
        batch: The member's batch size in samples.
        rate: Its own speed in samples per second, 0 while unknown.
        closed: It takes no more work in this epoch.
        completed: Samples completed in this epoch.
        claimed: Samples claimed in this epoch.
        reach: The end of its claims from the epoch's own pool.
        unfinished: Ranges claimed and not completed, oldest first.
    """

    epoch: int
    batch: int
    rate: float = 0.0
    closed: bool = False
    completed: int = 0
    claimed: int = 0
    reach: int = 0
    unfinished: tuple[Range, ...] = ()

    def pack(self) -> bytes:
        """The note in at most 1 kB. Ranges beyond that room are left out; the totals still tell that they exist."""
        ranges = self.unfinished[:_ROOM]
        head = (self.epoch, self.batch, self.rate, self.closed, self.completed, self.claimed, self.reach, len(ranges))
        return _HEADER.pack(*head) + pack_ranges(ranges)

    @staticmethod
    def unpack(note: bytes) -> Note:
        """The reverse of `pack`."""
        epoch, batch, rate, closed, completed, claimed, reach, count = _HEADER.unpack_from(note)
        body = note[_HEADER.size : _HEADER.size + count * PACKED.size]
        return Note(epoch, batch, rate, bool(closed), completed, claimed, reach, unpack_ranges(body))


class Done(Protocol):
    """What says which positions it completed: a ledger, or a share."""

    def done(self) -> list[Range]:
        """The ranges completed."""


class Audit(NamedTuple):
    """What an epoch's ledgers did against the law."""

    missing: list[Range]
    """Ranges nobody completed."""
    double: list[Range]
    """Ranges completed more than once."""

    @property
    def holds(self) -> bool:
        """Whether every position was completed exactly once."""
        return not self.missing and not self.double

    def __str__(self) -> str:
        if self.holds:
            return "every position was completed exactly once"
        words = [f"{sum(n for _, n in r)} positions {what} {r[:5]}" for what, r in self._faults() if r]
        return " and ".join(words) + " (first position, amount)"

    def _faults(self) -> list[tuple[str, list[Range]]]:
        return [("were never completed:", self.missing), ("were completed more than once:", self.double)]


def audit(members: Iterable[Done], total: int) -> Audit:
    """Which of the positions 0 .. `total`-1 were not completed exactly once by these members together."""
    edges = {0: 0, total: 0}
    for first, amount in (pair for member in members for pair in member.done()):
        edges[first] = edges.get(first, 0) + 1
        edges[first + amount] = edges.get(first + amount, 0) - 1
    missing, double, depth, marks = [], [], 0, sorted(edges)
    for here, there in pairwise(marks):
        depth += edges[here]
        if depth == 0 and here < total:
            missing.append((here, there - here))
        if depth > 1 or (depth == 1 and here >= total):
            double.append((here, there - here))
    return Audit(missing, double)
