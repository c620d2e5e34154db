"""Seconds a sample of every member: measured without an end, foreseen by nominal speed until then.

    nominal   "equal" | a list | "probe" ----> first part
    measured  every batch of every member, a running mean, told with each note ----> every later part

A pause (a validation, a checkpoint) would make all members look equally slow: a batch counts for at most `CLIP` times
the mean. The first batch of a run, which warms up, counts only until there is a second one.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from lightning_async.data.balance import Nominal
from lightning_async.data.crew import Desk
from lightning_async.data.ledger import Note
from lightning_async.data.pace import Pace

CLIP = 4.0
_SPEED = struct.Struct("<d")


class MeanPace(Pace):
    """This member's own speed: a running mean over its batches.

    Args:
        memory: Weight of the newest batch.
    """

    def __init__(self, memory: float) -> None:
        super().__init__()
        self._memory = memory
        self._mean = 0.0
        self._count = 0

    def enter(self, seconds: float) -> None:
        """A batch took so many seconds a sample."""
        self._count += 1
        if self._count <= 2:
            self._mean = seconds
        else:
            weight = max(self._memory, 1 / (self._count - 1))
            self._mean += weight * (min(seconds, CLIP * self._mean) - self._mean)

    @property
    def rate(self) -> float:
        """Samples per second, 0 while unknown."""
        return 1.0 / self._mean if self._count else 0.0


class Speeds:
    """The speeds of all members, as one of them knows them.

    Args:
        desk: The board and who is there.
        nominal: Speeds before any is measured.
        probe: Measures this member's nominal speed.
    """

    def __init__(self, desk: Desk, nominal: Nominal, probe: Callable[[], float] | None = None) -> None:
        self._desk = desk
        self._nominal = nominal
        self._probe = probe or matmuls_per_second
        self._probed = False
        self._rates: dict[int, float] = {}

    def listen(self) -> None:
        """Hear what the members have measured since."""
        for rank, raw in self._desk.notes().items():
            if (rate := Note.unpack(raw).rate) > 0:
                self._rates[rank] = rate

    def missing(self, ranks: Sequence[int]) -> list[int]:
        """Those whose probe is still to come; this member's own is made here."""
        if self._nominal != "probe" or all(rank in self._rates for rank in ranks):
            return []
        if not self._probed:
            self._probed = True
            self._desk.propose(self._key(self._desk.me), _SPEED.pack(self._probe()))
        return [rank for rank in ranks if self._desk.decided(self._key(rank)) is None]

    def seconds(self, ranks: Sequence[int]) -> list[float]:
        """Seconds a sample of each of these members; where none is measured, only the ratios count."""
        self.listen()
        nominal = {rank: self._foreseen(rank) for rank in ranks}
        known = [self._rates[rank] / nominal[rank] for rank in ranks if rank in self._rates]
        scale = median(known) if known else 1.0
        return [1.0 / self._rates.get(rank, scale * nominal[rank]) for rank in ranks]

    def memory(self) -> torch.Tensor:
        """Rows of (rank, samples per second), as they lie in a checkpoint."""
        self.listen()
        return torch.tensor(sorted(self._rates.items()), dtype=torch.float64).reshape(-1, 2)

    def recall(self, memory: torch.Tensor) -> None:
        """Go on with what an earlier run measured."""
        self._rates = {int(rank): rate for rank, rate in memory.tolist()}

    def _foreseen(self, rank: int) -> float:
        if isinstance(self._nominal, str):
            told = self._desk.decided(self._key(rank)) if self._nominal == "probe" else None
            return float(_SPEED.unpack(told)[0]) if told is not None else 1.0
        if rank >= len(self._nominal):
            raise ValueError(f"`nominal` has {len(self._nominal)} speeds, and there is a rank {rank}: give one a rank")
        return float(self._nominal[rank])

    def _key(self, rank: int) -> str:
        return f"data/nominal/{rank}"


def matmuls_per_second(seconds: float = 0.1) -> float:
    """A short probe: how many products of two small matrices the device makes in a second."""
    device = "cuda" if torch.cuda.is_initialized() else "cpu"  # type: ignore[no-untyped-call]
    square = torch.ones(256, 256, device=device)
    (square @ square).sum().item()  # the first one warms up
    count, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        (square @ square).sum().item()
        count += 1
    return max(1, count) / passed
