"""Loaders with workers on real ranks, one of them slow: at an epoch's end nobody waits for what another one hoarded."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from lightning_async import SpeedFaults
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import run

STEP, SLOW = 0.03, 5.0
WORKERS = 4
EPOCHS = 2


class Timed(Lit):
    """Remembers when the steps of each epoch began."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[float]] = [[] for _ in range(EPOCHS)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps[self.current_epoch].append(time.monotonic())
        return super().training_step(batch, batch_idx)


def _fit(workers: int, prefetch: int) -> Any:
    options = {"num_workers": workers, "prefetch_factor": prefetch, "persistent_workers": True} if workers else {}
    lit = Timed()
    faults = SpeedFaults(step_seconds=STEP, slow={1: SLOW})
    trainer(2, callbacks=[faults], max_epochs=EPOCHS).fit(lit, loader(4, **options), loader(40, shuffle=False))
    return lit.steps, lit.seen


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("workers", "prefetch"), [(WORKERS, 8), (WORKERS, 2), (0, 2)])
def test_ranks_come_to_their_last_steps_within_their_look_ahead(workers: int, prefetch: int) -> None:
    (fast, seen), (slow, also_seen) = run(2, _fit, workers, prefetch, timeout=120)
    assert set(Counter(seen + also_seen).values()) == {EPOCHS}
    ahead = min(workers * prefetch, 2 * WORKERS)  # in so short an epoch longer queues are not filled in the dark
    for epoch in range(EPOCHS):
        batch = (slow[epoch][-1] - slow[epoch][0]) / (len(slow[epoch]) - 1)  # as long as one was: a busy machine adds
        behind = abs(slow[epoch][-1] - fast[epoch][-1]) / batch
        assert behind <= 1 + max(1, ahead), f"epoch {epoch}: {behind:.1f} batches of the slow rank"
