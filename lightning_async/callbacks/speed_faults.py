"""Chosen ranks become slow, irregular, frozen or failing, and every run with the same seed does the same.

    batch        0        1        2        3        4
    rank 0   |#.......|#.......|#.......|#.......|#.......|     step_seconds = 0.02
    rank 1   |#...............................|#...........     slow = {1: 4.0}
    rank 2   |#.......|#.......|==== stands still ====|#...     freeze = {2: (2, 5.0)}
    rank 3   |#.......|#.......|#.......|RuntimeError           fail = {3: 3}

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
from collections.abc import Iterable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer


class SpeedFaults(Callback):
    """Makes chosen ranks slow, irregular, frozen or failing. For tests, demonstrations and benchmarks.

    Batches are counted by each rank from 0, over all epochs of one `fit`.

    Args:
        step_seconds: Seconds added before every batch on every rank, as if the model were larger.
        slow: How many times as long a rank takes: `{3: 4.0}` makes rank 3 four times slower than `step_seconds`.
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
        sigma: float = 0.0,
        freeze: dict[int, tuple[int, float]] | None = None,
        fail: dict[int, int] | None = None,
        seed: int = 0,
        hold_gil: bool = False,
    ) -> None:
        super().__init__()
        self.step_seconds = _at_least_0("step_seconds", step_seconds)
        self.sigma = _at_least_0("sigma", sigma)
        self.slow = dict(slow or {})
        self.freeze = dict(freeze or {})
        self.fail = dict(fail or {})
        self.seed = seed
        self.hold_gil = hold_gil
        self._check()
        self._batches = 0
        self._random = random.Random()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse ranks that this world does not have: a fault that never comes would prove nothing."""
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
        self._pass(self._seconds(rank))

    def _seconds(self, rank: int) -> float:
        mean = self.step_seconds * self.slow.get(rank, 1.0)
        if not self.sigma:
            return mean
        return mean * math.exp(self.sigma * self._random.gauss(0.0, 1.0) - self.sigma**2 / 2)

    def _pass(self, seconds: float) -> None:
        if not self.hold_gil:
            time.sleep(seconds)
            return
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    def _ranks(self) -> Iterable[int]:
        return {*self.slow, *self.freeze, *self.fail}

    def _check(self) -> None:
        for rank in self._ranks():
            if rank < 0:
                raise ValueError(f"ranks count from 0, got {rank}")
        for rank, factor in self.slow.items():
            if not (0 < factor < math.inf):
                raise ValueError(f"`slow` must hold positive factors, got {factor} for rank {rank}")
        for rank, (batch, seconds) in self.freeze.items():
            if batch < 0 or not (0 < seconds < math.inf):
                raise ValueError(
                    f"`freeze` must hold (batch from 0, positive seconds), got ({batch}, {seconds}) for rank {rank}"
                )
        for rank, batch in self.fail.items():
            if batch < 0:
                raise ValueError(f"`fail` must hold batches, counted from 0, got {batch} for rank {rank}")
        if (self.slow or self.sigma) and not self.step_seconds:
            raise ValueError("`slow` and `sigma` act on `step_seconds`, which is 0: set it, for example to 0.02")


def freeze_process(seconds: float) -> None:
    """Stop this whole process, and let a small one wake it after `seconds`."""
    waker = subprocess.Popen(["sh", "-c", 'sleep "$1"; kill -s CONT "$2"', "waker", str(seconds), str(os.getpid())])
    try:
        os.kill(os.getpid(), signal.SIGSTOP)
    finally:
        waker.wait()


def _at_least_0(name: str, value: float) -> float:
    if not (0 <= value < math.inf):
        raise ValueError(f"`{name}` must be at least 0, got {value}")
    return float(value)
