"""How much to claim: by measured speed, ever less towards the end, and nothing that others would finish earlier.

    claims of one member:   |====== about 10 s ======|=== half of its fair part ===|== ==|= =|b|b|   end of epoch
                                                                          (guided self-scheduling)

What remains is cut like this: a claim is at most half of what this member would get if all went on at their speeds, so
that whoever is slower than thought leaves the rest to the others. A member whose own outstanding work lasts longer
than the others need for all that remains takes nothing more (`outlasts`): so prefetched batches are not hoarded.
Before any speed is known that cannot be told: then `claiming.py` keeps the queues short.
Pure arithmetic: no clock, no board.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

LEAST = 1 / 8  # of what is wanted: smaller claims wait until they are worth one


class Pace:
    """This member's own speed: the median over its last batches, so that a validation in between does not count."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=9)
        self._since: float | None = None

    def start(self, now: float) -> None:
        """A batch begins now, unless one is under way."""
        self._since = now if self._since is None else self._since

    def stop(self) -> None:
        """What passes from here to the next `start` is not training."""
        self._since = None

    def completed(self, samples: int, now: float) -> None:
        """A batch of `samples` was finished; the next one begins."""
        if self._since is not None and now > self._since and samples > 0:
            self.enter((now - self._since) / samples)
        self._since = now

    def enter(self, seconds: float) -> None:
        """A batch took so many seconds a sample."""
        self._seconds.append(seconds)

    @property
    def rate(self) -> float:
        """Samples per second, 0 while unknown."""
        return 1.0 / median(self._seconds) if self._seconds else 0.0


class LoaderPace(Pace):
    """A pace by which data are shared out. The first batch after a `start` holds the start of the loader's workers: it
    counts only where an epoch had no other one."""

    def __init__(self) -> None:
        super().__init__()
        self._first: float | None = None
        self._starting = True

    def stop(self) -> None:
        """What passes from here to the next `start` is not training."""
        if self._first is not None and not self.rate:
            super().enter(self._first)
        super().stop()
        self._first, self._starting = None, True

    def completed(self, samples: int, now: float) -> None:
        """A batch of `samples` was finished; the next one begins."""
        super().completed(samples, now)
        self._starting = False

    def enter(self, seconds: float) -> None:
        """A batch took so many seconds a sample."""
        if self._starting:
            self._first = seconds
        else:
            super().enter(seconds)


@dataclass(frozen=True, slots=True)
class Worker:
    """A member as the arithmetic sees it: speed, samples it still has to train on, batch size."""

    rate: float
    outstanding: float
    batch: int

    def batches_before(self, deadline: float) -> int:
        """How many more whole batches it would finish strictly before `deadline` seconds from now."""
        return max(0, math.ceil((deadline * self.rate - self.outstanding) / self.batch) - 1)


def outlasts(me: Worker, amount: int, remaining: float, others: Sequence[Worker]) -> bool:
    """Whether the others would finish all that remains before this member had trained on `amount` more samples.

    This is what a list schedule (each batch to whoever finishes it first) would answer; a tie means no.
    """
    if me.rate <= 0:
        return False
    deadline = (me.outstanding + amount) / me.rate
    return sum(w.batch * w.batches_before(deadline) for w in others) >= remaining


def appetite(me: Worker, held: int, remaining: float, others: Sequence[Worker], seconds: float) -> int:
    """How many samples to claim next: whole batches, 0 if what is held is enough for now."""
    everybody = me.rate + sum(w.rate for w in others)
    fair = remaining * me.rate / everybody / 2 if me.rate > 0 else 0.0
    wanted = min(me.rate * seconds, fair)
    amount = _whole(wanted - held, me.batch)
    if amount < wanted * LEAST:  # topping up batch by batch would cut the order into more pieces than a note can hold
        amount = 0
    if amount == 0 and held < me.batch:
        amount = me.batch
    while amount > me.batch and outlasts(me, amount, remaining, others):
        amount = max(me.batch, _whole(amount / 2, me.batch))
    return amount


def _whole(samples: float, batch: int) -> int:
    return max(0, int(samples // batch)) * batch
