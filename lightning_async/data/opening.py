"""What all members agree on when an epoch opens: the first to open it decides.

    order      0 ................................... span ...... total     a limit leaves the first `span` positions
    done           ####     ##          #                                  trained on before, in an interrupted run
    rest       0..3    4..11  12.. .. .. . ........ used ...               numbered anew: all shares go by these numbers

Every member must have a batch: Lightning skips the validation of a rank without one, and the others would wait for it.
So a rest with fewer than a batch for each begins again, as a DistributedSampler's does, and those few samples come
twice. One without a single batch is over.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_async.data.ranges import Range, pack_ranges, united

_HEAD = struct.Struct("<QQQQ")
_SEAT = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Opening:
    """An epoch as it was opened.

    Attributes:
        total: Positions in the order.
        span: How many of the first of them count; where members had unlike limits in mind, this one holds.
        used: How many numbers of the rest are handed out.
        digest: The fingerprint of the order and of what is done.
        seats: (rank, amount of its first range), in the order of the numbers; of claimed epochs.
    """

    total: int
    span: int
    used: int
    digest: int
    seats: tuple[Range, ...] = ()

    @property
    def reserved(self) -> int:
        """Numbers given out without a ticket."""
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
        head = _HEAD.pack(self.total, self.span, self.used, self.digest)
        return head + b"".join(_SEAT.pack(*seat) for seat in self.seats)

    @staticmethod
    def unpack(value: bytes) -> Opening:
        """The reverse of `pack`."""
        seats = tuple((rank, amount) for rank, amount in _SEAT.iter_unpack(value[_HEAD.size :]))
        total, span, used, digest = _HEAD.unpack_from(value)
        return Opening(total, span, used, digest, seats)


def usable(left: int, *, members: int, unit: int) -> int:
    """How many of the `left` samples of an epoch that goes on are handed out, at least `unit` for each member."""
    whole = left - left % unit
    return max(whole, members * unit) if whole else 0


def stamp(digest: int, done: Sequence[Range]) -> int:
    """The fingerprint of an order of which some positions are done."""
    return zlib.crc32(pack_ranges(united(done)), digest) if done else digest


def refuse_other_order(epoch: int, mine: Opening, decided: Opening) -> None:
    """Raise if this member's order is not the one all agreed on."""
    if mine.total != decided.total:
        raise ValueError(
            f"The members disagree on the size of epoch {epoch}: {mine.total} samples here, {decided.total} there"
        )
    if mine.digest != decided.digest:
        raise ValueError(
            f"The members disagree on the order of epoch {epoch}: the sampler must give the same indices on every "
            "rank; seed it from the epoch alone, not from the rank or from a random state that training changes"
        )


def refuse_second_order(epoch: int, mine: tuple[int, int], other: tuple[int, int]) -> None:
    """Raise if one share is asked to feed two unlike loaders; an order is given by its length and its fingerprint."""
    if mine != other:
        raise ValueError(
            f"Epoch {epoch} was begun with another order: a share feeds one loader, so train with a single DataLoader "
            "(a data set that returns tuples can stand for several)"
        )
