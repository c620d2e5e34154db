"""Chosen ranks become slow, irregular, frozen or failing, and every run with the same seed does the same.

    batch        0        1        2        3        4
    rank 0   |#.......|#.......|#.......|#.......|#.......|     step_seconds = 0.02
    rank 1   |#...............................|#...........     slow = {1: 4.0}
    rank 2   |#.......|#.......|==== stands still ====|#...     freeze = {2: (2, 5.0)}
    rank 3   |#.......|#.......|#.......|RuntimeError           fail = {3: 3}
    rank 4   |#.......|#...............|#...............|#...   schedule = {4: [(1, 2.0), (3, 1.0)]}

The added time comes before the batch's own work (`#` above). A freeze stops the whole process, as a machine that swaps
or a paused container does: its network threads and its heartbeats stand still too. Sleeping is the feature here.
"""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_async.callbacks.once import stands_once


class SpeedFaults(Callback):
    """Makes chosen ranks slow, irregular, frozen or failing. For tests, demonstrations and benchmarks.

    Batches are counted by each rank from 0, over all epochs of one `fit`.

    Args:
        step_seconds: Seconds added before every batch on every rank, as if the model were larger.
        slow: How many times as long a rank takes: `{3: 4.0}` makes rank 3 four times slower than `step_seconds`.
        schedule: `{rank: [(batch, factor), ...]}`: from that batch on the rank takes so many times as long, up to the
            next entry; before the first one, as long as `slow` says.
        repeat: The schedules begin anew after so many batches: a neighbour that comes every so often. None: never.
        stall: `{rank: (every, seconds)}`: on average once in `every` batches the rank stands still for so long, at
            batches drawn from the seed: garbage collection, a hiccup of the file system.
        sigma: Log-normal spread of the added time; its mean stays the same, so rates can still be summed.
        freeze: `{rank: (batch, seconds)}`: the rank's whole process is stopped before that batch, once, for so long.
        fail: `{rank: batch}`: the rank raises an error before that batch.
        seed: Seed of the spread; each rank draws from its own stream, and the module's random numbers are untouched.
        hold_gil: Compute in pure Python, holding its lock against this process's other threads, in place of sleeping.
    """

    def __init__(
        self,
        *,
        step_seconds: float = 0.0,
        slow: dict[int, float] | None = None,
        schedule: dict[int, list[tuple[int, float]]] | None = None,
        repeat: int | None = None,
        stall: dict[int, tuple[float, float]] | None = None,
        sigma: float = 0.0,
        freeze: dict[int, tuple[int, float]] | None = None,
        fail: dict[int, int] | None = None,
        seed: int = 0,
        hold_gil: bool = False,
    ) -> None:
        super().__init__()
        self.step_seconds = _at_least_0("step_seconds", step_seconds)
        self.sigma = _at_least_0("sigma", sigma)
        self.slow: dict[int, float] = _by_rank("slow", slow)
        self.schedule = {rank: _entries(rank, entries) for rank, entries in _by_rank("schedule", schedule).items()}
        self.repeat = repeat
        self.stall = {rank: _pair("stall", rank, entry) for rank, entry in _by_rank("stall", stall).items()}
        self.freeze = {rank: _pair("freeze", rank, entry) for rank, entry in _by_rank("freeze", freeze).items()}
        self.fail: dict[int, int] = _by_rank("fail", fail)
        self.seed = seed
        self.hold_gil = hold_gil
        self._check()
        self._batches = 0
        self._random = random.Random()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse ranks that this world does not have: a fault that never comes would prove nothing."""
        stands_once(trainer, self, "their pauses would add up")
        missing = sorted(rank for rank in self._ranks() if rank >= trainer.world_size)
        if missing:
            raise MisconfigurationException(
                f"SpeedFaults names rank {missing[0]}, but the ranks of this run are 0 to {trainer.world_size - 1}: "
                "start more of them or name another rank"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Each `fit` begins at batch 0 and with the same random numbers."""
        self._batches = 0
        self._random = random.Random(f"{self.seed}/{trainer.global_rank}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Fail, freeze or dawdle, in this order."""
        rank, now = trainer.global_rank, self._batches
        self._batches += 1
        if self.fail.get(rank) == now:
            raise RuntimeError(f"SpeedFaults: rank {rank} fails at batch {now}, as asked")
        at, seconds = self.freeze.get(rank, (None, 0.0))
        if at == now:
            freeze_process(seconds)
        self._pass(self._seconds(rank, now) + self._stalls(rank))

    def _seconds(self, rank: int, batch: int) -> float:
        mean = self.step_seconds * self.factor(rank, batch)
        if not self.sigma:
            return mean
        return mean * math.exp(self.sigma * self._random.gauss(0.0, 1.0) - self.sigma**2 / 2)

    def factor(self, rank: int, batch: int) -> float:
        """How many times as long as `step_seconds` this batch takes on this rank."""
        within = batch if self.repeat is None else batch % self.repeat
        found = self.slow.get(rank, 1.0)
        for begin, factor in self.schedule.get(rank, ()):
            found = factor if begin <= within else found
        return found

    def _stalls(self, rank: int) -> float:
        every, seconds = self.stall.get(rank, (1.0, 0.0))
        return seconds if seconds and self._random.random() * every < 1 else 0.0

    def _pass(self, seconds: float) -> None:
        if not self.hold_gil:
            time.sleep(seconds)  # the fault itself: it stands for compute, and waits for nothing
            return
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    def _ranks(self) -> Iterable[int]:
        return {*self.slow, *self.schedule, *self.stall, *self.freeze, *self.fail}

    def _check(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"`seed` must be an integer, got {self.seed!r}")
        if not isinstance(self.hold_gil, bool):
            raise ValueError(f"`hold_gil` must be True or False, got {self.hold_gil!r}")
        for rank, factor in self.slow.items():
            if not _number(factor) or not 0 < factor < math.inf:
                raise ValueError(f"`slow` must hold positive factors, got {factor!r} for rank {rank}")
        for rank, (batch, seconds) in self.freeze.items():
            if not isinstance(batch, int) or batch < 0 or not 0 < seconds < math.inf:
                raise ValueError(
                    f"`freeze` must hold (batch from 0, positive seconds), got ({batch}, {seconds}) for rank {rank}"
                )
        for rank, batch in self.fail.items():
            if not isinstance(batch, int) or isinstance(batch, bool) or batch < 0:
                raise ValueError(f"`fail` must hold batches, counted from 0, got {batch!r} for rank {rank}")
        self._check_schedules()
        if (self.slow or self.sigma or self.schedule) and not self.step_seconds:
            acts = "`slow` and `sigma` act" if not self.schedule else "`slow`, `schedule` and `sigma` act"
            raise ValueError(f"{acts} on `step_seconds`, which is 0: set it, for example to 0.02")

    def _check_schedules(self) -> None:
        for rank, entries in self.schedule.items():
            begins = [begin for begin, _ in entries]
            if (
                not all(isinstance(begin, int) for begin in begins)
                or not begins
                or begins[0] < 0
                or any(b <= a for a, b in pairwise(begins))
            ):
                raise ValueError(f"`schedule` must hold batches from 0 that grow, got {begins} for rank {rank}")
            for begin, factor in entries:
                if not (0 < factor < math.inf):
                    raise ValueError(f"`schedule` must hold positive factors, got {factor} at {begin} for rank {rank}")
        self._check_repeat()
        for rank, (every, seconds) in self.stall.items():
            if not (1 <= every < math.inf and 0 < seconds < math.inf):
                raise ValueError(
                    f"`stall` must hold (batches from 1, positive seconds), got ({every}, {seconds}) for rank {rank}"
                )

    def _check_repeat(self) -> None:
        if self.repeat is None:
            return
        if not isinstance(self.repeat, int) or isinstance(self.repeat, bool) or self.repeat < 1 or not self.schedule:
            raise ValueError(f"`repeat` must be an integer of at least 1 and needs a `schedule`, got {self.repeat!r}")
        for rank, entries in self.schedule.items():
            if entries[-1][0] >= self.repeat:
                raise ValueError(
                    f"`schedule` begins anew after {self.repeat} batches (`repeat`), so its entry at batch "
                    f"{entries[-1][0]} for rank {rank} never comes: leave it out, or repeat later"
                )


HOW = {
    "schedule": "{rank: [(batch, factor), ...]}",
    "stall": "{rank: (every, seconds)}",
    "freeze": "{rank: (batch, seconds)}",
}


def _by_rank(name: str, given: Any) -> dict[int, Any]:
    """What was given for each rank."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"`{name}` must be a dictionary by rank, got {given!r}")
    for rank in given:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ValueError(f"ranks count from 0, got {rank!r} in `{name}`")
    return dict(given)


def _pair(name: str, rank: int, entry: Any) -> tuple[Any, Any]:
    """Two numbers."""
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not all(map(_number, entry)):
        raise ValueError(f"`{name}` must be {HOW[name]}, got {entry!r} for rank {rank}")
    return entry[0], entry[1]


def _entries(rank: int, entries: Any) -> list[tuple[Any, Any]]:
    """Pairs of numbers."""
    return [_pair("schedule", rank, entry) for entry in (entries if isinstance(entries, (list, tuple)) else [entries])]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def freeze_process(seconds: float) -> None:
    """Stop this whole process, and let a small one wake it after `seconds`."""
    waker = subprocess.Popen(["sh", "-c", 'sleep "$1"; kill -s CONT "$2"', "waker", str(seconds), str(os.getpid())])
    try:
        os.kill(os.getpid(), signal.SIGSTOP)
    finally:
        waker.wait()


def _at_least_0(name: str, value: float) -> float:
    if not _number(value) or not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be at least 0, got {value!r}")
    return float(value)
