"""How much each member gets so that all end together: speeds and integers, no clock, no board.

    seconds   |                   has #   gets +
              |---- level ----------------------------------------------
              |  ++       ++                ###
              |  ++       ##      ++        ###      has more than the level: gets nothing, and gives nothing away
              +--##-------##------##--------###-------------------------
              member 0     1       2         3

`top_up` pours an amount on what the members have, each column as high as its samples last, and the water finds its
level. Of whole samples the last few go each to whoever ends it first. So the sum is the amount, exactly, and of those
that got something nobody ends more than one sample's time after anybody else could have ended it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

FEW = 4


def top_up(amount: int, have: Sequence[float], seconds: Sequence[float], *, least: int = 0, unit: int = 1) -> list[int]:
    """How many of `amount` more samples each member gets; they sum to `amount`.

    Args:
        amount: Samples to give.
        have: Samples that each member has.
        seconds: Seconds that each member needs for a sample.
        least: What each gets in any case, as far as the amount goes.
        unit: Samples are given by so many; what does not make a whole one goes to whoever ends first.
    """
    if not all(0 < s < math.inf for s in seconds):
        raise ValueError(f"seconds a sample must be above 0 and finite, got {list(seconds)}")
    least = min(least, amount // len(have))
    have = [samples + least for samples in have]
    units, rest = divmod(amount - least * len(have), unit)
    sizes = [least + unit * count for count in _poured(units, [h / unit for h in have], [s * unit for s in seconds])]
    first = min(range(len(have)), key=lambda k: (have[k] - least + sizes[k] + rest) * seconds[k])
    sizes[first] += rest
    return sizes


def next_part(given: int, total: int, parts: int, *, unit: int = 1) -> int:
    """How many samples the next of `parts` equal parts has, when so many are given out; 0 when all are."""
    ends = (total if number == parts else total * number // parts // unit * unit for number in range(1, parts + 1))
    return next((end - given for end in ends if end > given), 0)


def worthwhile(parts: int, total: int, *, members: int, batch: int) -> int:
    """So many parts that each has at least `FEW` batches a member: of fewer, a slow member could not get a share."""
    return max(1, min(parts, total // (FEW * members * batch)))


def level(amount: float, have: Sequence[float], seconds: Sequence[float]) -> float:
    """The seconds after which all that get something have ended."""
    work, rate, found = float(amount), 0.0, math.inf
    for lasts, k in sorted((have[k] * seconds[k], k) for k in range(len(have))):
        if lasts >= found:
            break
        work, rate = work + have[k], rate + 1 / seconds[k]
        found = work / rate
    return found


def _poured(amount: int, have: Sequence[float], seconds: Sequence[float]) -> list[int]:
    """`top_up` in whole units."""
    high = level(amount, have, seconds)
    sizes = [max(0, math.floor(high / s - h)) for h, s in zip(have, seconds, strict=True)]
    ends = [((h + n + 1) * s, k) for k, (h, n, s) in enumerate(zip(have, sizes, seconds, strict=True))]
    heapq.heapify(ends)
    for _ in range(amount - sum(sizes)):
        end, k = heapq.heappop(ends)
        sizes[k] += 1
        heapq.heappush(ends, (end + seconds[k], k))
    while sum(sizes) > amount:  # a quotient that was rounded up to the next integer
        k = max((k for k in range(len(sizes)) if sizes[k]), key=lambda k: (have[k] + sizes[k]) * seconds[k])
        sizes[k] -= 1
    return sizes
