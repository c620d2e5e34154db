"""Members may have unlike batches, and streams of unlike lengths: a batch weighs as many samples as it has.

samples of a batch     8     8     4           told by all, before any of them draws
grain                  4                       the largest number that divides them all
weight of a batch      2     2     1           a step of the run is as much as all three have: 5
"""

from __future__ import annotations

import math
from fractions import Fraction

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds


class Sizes:
    """What a batch of each member weighs, and how long its streams are."""

    def __init__(self) -> None:
        self._batch = 1
        self.forget()

    def forget(self) -> None:
        """What the others said. Idempotent."""
        self._usual: Fraction | None = None
        self._batches_of: dict[int, int] = {}
        self._lengths_of: dict[int, int] = {}

    @property
    def mass(self) -> int:
        """What a step of this rank weighs: a member with larger batches counts for more, each sample for the same."""
        return UNIT * self._batch

    @property
    def batch(self) -> int:
        """This member's samples of a batch."""
        return self._batch

    @property
    def weight(self) -> int:
        """What a batch of this member counts for in the run: 1, unless members' batches are unlike (`tally.py`)."""
        return self._batch // self._grain

    def weight_of(self, rank: int) -> int:
        """What a batch of the member that this rank speaks for counts for."""
        return self._batches_of.get(rank, self._batch) // self._grain

    def step_of(self, members: int) -> int:
        """What a step of the run counts for: a batch of each of so many members."""
        return int(self._mean * members / self._grain)

    @property
    def usual(self) -> float:
        """A batch of a member, in samples, on average over the members."""
        return float(self._mean)

    def tell_sizes(self, rounds: Rounds, length: int | None, *, speaks: bool) -> Wait[None]:
        """All say the samples of their batches and the lengths of their streams; of a member, who speaks for it."""
        mine = f"{self._batch} {'' if length is None else length}".strip() if speaks else ""
        words = yield from rounds.agree(mine.encode(), what="the batch sizes")
        said = {rank: [int(number) for number in word.split()] for rank, word in words.items() if word}
        self._batches_of = {rank: batch for rank, (batch, *_) in said.items()}
        self._lengths_of = {rank: lengths[0] for rank, (_, *lengths) in said.items() if lengths}
        sizes = self._batches_of.values()
        self._usual = Fraction(sum(sizes), len(sizes)) if sizes else None

    def length_of_all(self, limit: int | float, accumulated: int) -> int | None:
        """How many batches the run has in an epoch of streams of unlike lengths, each of which ends with a step of the
        batches that are left, if so many make a step; None where they are alike, or not all have a length."""
        n, lengths = len(self._batches_of), self._lengths_of
        if len(lengths) < n or len(set(lengths.values())) < 2:
            return None
        whole = sum(length * self.weight_of(rank) for rank, length in lengths.items())
        if isinstance(limit, int) and limit * self.step_of(n) <= whole:
            return limit
        steps = sum(math.ceil(length / accumulated) * self.weight_of(rank) for rank, length in lengths.items())
        return math.ceil(steps / self.step_of(n)) * accumulated

    @property
    def _mean(self) -> Fraction | int:
        return self._usual or self._batch

    @property
    def _grain(self) -> int:
        """The largest number of samples that divides all members' batches."""
        return math.gcd(self._batch, *self._batches_of.values())
