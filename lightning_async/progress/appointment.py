"""An appointment says after how many of its own steps each member stops, so that all arrive at one time.

    target 12 more     member 0   |-|-|-|-|-|-|-|-|-| 9      speeds 3 : 1, so 9 and 3
                       member 1   |- - -|- - -|- - -| 3

It is made a little ahead, from counts and speeds as known then; each member keeps its own part without looking at the
others. The parts add up to the target exactly, unless somebody has already gone past its part, or members' batches
weigh so unlike (2 and 3) that none fits into what is left: then the lightest does one more. Pure arithmetic.
"""

from __future__ import annotations

import heapq
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median

from lightning_async.progress.tally import Unit

_HEAD = struct.Struct("<BQ")
_PART = struct.Struct("<IQ")
HALVINGS = 60


@dataclass(frozen=True, slots=True)
class Sight:
    """A member as the others see it: its count by now, its speed, and whether it goes on.

    Attributes:
        count: Where it is by now, in fractions of what is under way.
        rate: How much it adds in a second; 0 while unknown.
        goes_on: False for one that has ended its epoch, or was not heard of lately.
        weight: What each of its count counts for in the sum.
    """

    count: float
    rate: float
    goes_on: bool = True
    weight: int = 1

    def least(self, seconds: float) -> int:
        """The first count at which it can still stop when it hears of it so much later."""
        return math.floor(self.count + self.rate * seconds) + 1 if self.goes_on else math.floor(self.count)


@dataclass(frozen=True, slots=True)
class Appointment:
    """Where each member stops.

    Attributes:
        unit: What is counted.
        target: The sum that was aimed at, of what all counts weigh; 0 for "as soon as possible".
        parts: The count of its own at which each member stops.
    """

    unit: Unit
    target: int
    parts: Mapping[int, int]

    def in_step(self) -> Appointment:
        """The same for all: after the last of these steps."""
        return replace(self, parts=dict.fromkeys(self.parts, max(self.parts.values())))

    def pack(self) -> bytes:
        """As bytes, for the board."""
        return _HEAD.pack(self.unit, self.target) + b"".join(_PART.pack(*part) for part in self.parts.items())

    @classmethod
    def unpack(cls, value: bytes) -> Appointment:
        """The reverse of `pack`."""
        unit, target = _HEAD.unpack_from(value)
        return cls(Unit(unit), target, dict(_PART.iter_unpack(value[_HEAD.size :])))


def soon(unit: Unit, sights: Mapping[int, Sight], latency: float) -> Appointment:
    """As soon as everybody can have heard of it."""
    return Appointment(unit, 0, {rank: sight.least(latency) for rank, sight in sights.items()})


def appoint(unit: Unit, target: int, sights: Mapping[int, Sight], latency: float, elsewhere: int = 0) -> Appointment:
    """Parts that add up to `target` and end at one time.

    Args:
        unit: What is counted.
        target: The sum of all members' counts at which they stop.
        sights: The members that live.
        latency: How long it takes until all have heard of it.
        elsewhere: What others have counted that are not there any more.
    """
    parts = {rank: sight.least(latency) for rank, sight in sights.items()}
    rates = _rates(sights)
    if rates and weigh(parts, sights) + elsewhere < target:
        _fill(parts, target - elsewhere, sights, rates)
    return Appointment(unit, target, parts)


def weigh(parts: Mapping[int, int], sights: Mapping[int, Sight]) -> int:
    """What these parts count for together."""
    return sum(part * sights[rank].weight for rank, part in parts.items())


def _rates(sights: Mapping[int, Sight]) -> dict[int, float]:
    """The speeds of those that go on; an unknown one is taken for the median of the known, or for 1 like all."""
    known = [sight.rate for sight in sights.values() if sight.goes_on and sight.rate > 0]
    usual = median(known) if known else 1.0
    return {rank: sight.rate or usual for rank, sight in sights.items() if sight.goes_on}


def _fill(parts: dict[int, int], target: int, sights: Mapping[int, Sight], rates: Mapping[int, float]) -> None:
    """Raise the parts of those that go on to the target: first to one moment, then one by one, the soonest first."""

    def by(seconds: float) -> dict[int, int]:
        ahead = {rank: math.floor(sights[rank].count + rate * seconds) for rank, rate in rates.items()}
        return {**parts, **{rank: max(parts[rank], part) for rank, part in ahead.items()}}

    def next_end(rank: int) -> tuple[float, int]:
        return (parts[rank] + 1 - sights[rank].count) / rates[rank], rank

    low, high = 0.0, (target + len(rates)) / min(rates.values())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if weigh(by(middle), sights) <= target else (low, middle)
    parts.update(by(low))
    left = target - weigh(parts, sights)
    queue = [next_end(rank) for rank in rates]
    heapq.heapify(queue)
    while left and queue:
        _, rank = queue[0]
        if sights[rank].weight > left:
            heapq.heappop(queue)
            continue
        parts[rank] += 1
        left -= sights[rank].weight
        heapq.heapreplace(queue, next_end(rank))
    if left:
        parts[min(rates, key=lambda rank: sights[rank].weight)] += 1
