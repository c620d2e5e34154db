"""Data of a rank's own in its log: samples without numbers, so the log says when the rank drew, and not what.

    log       epoch [chance]   drawn 1   drawn 2   batch   drawn 3   batch   batch      2 of 3 are on their way at most
    replay    the same loader is drawn from at the same points: the k-th batch that it trains on is the k-th of the run

What comes of a stream, or of a split of the user's own, is a function of where it began (anew, or at a checkpoint), of
the rank that draws, and of the random generators.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from lightning_async.data.heard import Ear

if TYPE_CHECKING:
    from lightning_async.strategies.recording import Recording


class Drawing(Ear):
    """The log hears of one loader.

    Args:
        recording: The log.
        epoch: The epoch that an iterator is made for: there may be several for one.
        size: How many samples the loader's data set has; 0 where it does not say.
        first: Whether it speaks for all loaders that are drawn from together.
        around: What stands around the user's code: in a replay, the rank and the world of the run.
    """

    def __init__(
        self,
        recording: Recording,
        epoch: Callable[[], int],
        size: int,
        *,
        first: bool,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._recording, self._epoch, self._size = recording, epoch, size
        self._first, self._around = first, around
        self._begun: int | None = None

    def begins(self) -> AbstractContextManager[object]:
        """Say so once an epoch. Hooks may draw between this and the first batch."""
        if self._first and self._epoch() != self._begun:
            self._begun = self._epoch()
            self._recording.epoch(self._begun, self._size)
            self._recording.strayed()
        return self._around()

    def draws(self) -> AbstractContextManager[object]:
        """What others drew comes before what the data draw."""
        self._recording.fetching()
        return self._around()

    def drew(self) -> None:
        """One more batch is on its way."""
        if self._first:
            self._recording.drew()
