"""How far a pipeline has come, for the logbook: rank 0 counts what it trains on, and hears the replicas at rests.

    before this fit    + what this last stage did in it    + what the other last stages had done by the last rest

All pipelines step together, so an update is counted once. In between, their samples are no fewer than is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_async.progress.tally import ZERO, Tally


class PipeCounts:
    """The counts of one rank.

    Args:
        own: What this rank has done since it is there.

    Attributes:
        n: A step of the run counts for one update.
    """

    n = 1

    def __init__(self, own: Callable[[], Tally]) -> None:
        self._own, self._before, self._start, self._others = own, ZERO, ZERO, 0

    def begin(self, before: Sequence[int] | Tally) -> None:
        """A fit begins, behind what was done `before`."""
        self._before, self._start, self._others = Tally(*before), self._own(), 0

    @property
    def mine(self) -> int:
        """The samples that this rank has counted in this fit."""
        return self._own().samples - self._start.samples

    def hear(self, others: int) -> None:
        """The other ranks have counted so many."""
        self._others = others

    def told(self) -> Tally:
        """What all have done at least; at a rest, exactly."""
        own = self._before.plus(self._own().minus(self._start))
        return own.plus(Tally(samples=self._others))

    def told_taken(self) -> int:
        """The updates of it."""
        return self.told().updates
