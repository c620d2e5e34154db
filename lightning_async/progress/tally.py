"""What was trained on, counted in three units; the run's progress is the sum over its members.

member 0   |-|-|-|-|-|-|      6 batches                 n = 2: progress = (6 + 2) / 2 = 4 steps
member 1   |- - -|- - -|      2 batches                 of a synchronous run

A step is a batch of each. Where their batches are unlike, each weighs what it has in samples, in the largest whole
numbers that divide them all, and n is the sum of these weights: batches of 4 and 12 count 1 and 3, and a step is 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple


class Unit(IntEnum):
    """What is counted; the place in a `Tally`."""

    BATCHES = 0
    UPDATES = 1
    SAMPLES = 2


class Tally(NamedTuple):
    """Counts of one member, or of all."""

    batches: int = 0
    updates: int = 0
    samples: int = 0

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Tally) -> Tally:
        """What came after `other`."""
        return Tally(*(a - b for a, b in zip(self, other, strict=True)))

    def times(self, weight: int) -> Tally:
        """What they count for if each batch and each update weighs so much; a sample is a sample."""
        return Tally(self.batches * weight, self.updates * weight, self.samples)

    def at_least(self, unit: Unit, count: int) -> Tally:
        """The same, with no less than `count` in this unit."""
        return Tally(*(max(own, count) if place == unit else own for place, own in enumerate(self)))


ZERO = Tally()


def total(tallies: Iterable[Tally]) -> Tally:
    """The sum."""
    found = Tally()
    for tally in tallies:
        found = found.plus(tally)
    return found
