"""Who is slow: a straggler's step takes longer than the median by more than k times what steps usually differ by.

    seconds of work a step:    rank 0  0.020    rank 1  0.021    rank 2  0.020    rank 3  0.080
    median (of an even number the lower one) 0.020, usual difference 0.001 -> rank 3

The usual difference is the median of the distances from the median, and at least 5 % of it: among two ranks, or among
many that are equal to the microsecond, nothing else would be left to judge by.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low

LEAST = 0.05


def stragglers(seconds: Mapping[int, float], k: float = 3.0) -> tuple[int, ...]:
    """The slow ranks, the slowest first."""
    known = {rank: value for rank, value in seconds.items() if value > 0}
    if len(known) < 2:
        return ()
    middle = median_low(known.values())
    usual = max(median_low(abs(value - middle) for value in known.values()), LEAST * middle)
    slow = [rank for rank, value in known.items() if value > middle + k * usual]
    return tuple(sorted(slow, key=lambda rank: -known[rank]))


def gain(own: Mapping[int, float], seconds: float) -> float:
    """How many times as many steps all ranks would take if nobody waited: the sum of their own rates against now.

    Args:
        own: Seconds of own work in a step, by rank.
        seconds: Seconds that a step takes now, on every rank.
    """
    known = [value for value in own.values() if value > 0]
    return sum(1 / value for value in known) * seconds / len(known) if known and seconds > 0 else 1.0
