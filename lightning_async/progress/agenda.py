"""The agenda says at which counts of all members together something is due, and what.

    validate every 3 steps of n = 2      6        12        18        24   batches of all
    stop at 10 updates                                 20                  updates of all

Points are multiples in the run or in the epoch. A point counts as reached when the sum has come there, or when the
appointment that was made for it was kept: a death may leave the sum a little short of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Flag, auto

from lightning_async.progress.tally import Tally, Unit


class Due(Flag):
    """What a meeting has to do besides meeting."""

    NOTHING = 0
    VALIDATE = auto()
    STOP = auto()
    END_EPOCH = auto()


@dataclass(frozen=True)
class Item:
    """Something that is due again and again.

    Attributes:
        due: What.
        unit: What is counted.
        every: At which multiples, summed over all members.
        in_epoch: Whether each epoch counts from 0.
        once: Only at the first multiple.
        below: Only at multiples below this one; the epoch's end stands for the others.
    """

    due: Due
    unit: Unit
    every: int
    in_epoch: bool = False
    once: bool = False
    below: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"`every` must be at least 1, got {self.every}")

    def base(self, epoch: Tally) -> int:
        """Where its multiples begin, given the tally at the epoch's beginning."""
        return epoch[self.unit] if self.in_epoch else 0

    def after(self, count: int, epoch: Tally) -> int:
        """The first point after `count`."""
        base = self.base(epoch)
        return base + self.every * (1 if self.once else (count - base) // self.every + 1)

    def passed(self, before: int, now: int, epoch: Tally) -> bool:
        """Whether a point lies after `before` and not after `now`."""
        point = self.after(before, epoch)
        return before < point <= now and self.has(point, epoch)

    def has(self, point: int, epoch: Tally) -> bool:
        """Whether this multiple is one of its points."""
        return self.below is None or point - self.base(epoch) < self.below


class Agenda:
    """All that is due by counts."""

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self.items = tuple(items)

    def points(self, now: Tally, epoch: Tally) -> Iterator[tuple[Unit, int]]:
        """The next point of each item, `now` and at the epoch's beginning `epoch` being the sums over all members."""
        for item in self.items:
            point = item.after(now[item.unit], epoch)
            if point > now[item.unit] and item.has(point, epoch):
                yield item.unit, point

    def due(self, before: Tally, now: Tally, epoch: Tally) -> Due:
        """What became due between two meetings."""
        found = Due.NOTHING
        for item in self.items:
            if item.passed(before[item.unit], now[item.unit], epoch):
                found |= item.due
        return found

    @property
    def ends_epochs(self) -> bool:
        """Whether epochs end by it, and not with the data."""
        return any(item.due & Due.END_EPOCH for item in self.items)

    def ends_epoch(self, unit: Unit, point: int, epoch: Tally) -> bool:
        """Whether the epoch ends at this point."""
        items = (item for item in self.items if item.due & Due.END_EPOCH and item.unit == unit)
        return any(item.after(point - 1, epoch) == point for item in items)
