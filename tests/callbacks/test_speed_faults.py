"""Faults come where they are asked for, as long as they are asked for, and the same with the same seed."""

from __future__ import annotations

import pickle
import random
import threading
import time
from statistics import fmean
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async.callbacks import SpeedFaults
from lightning_async.callbacks.speed_faults import freeze_process
from tests.strategies.ranks import run


class FakeTrainer:
    """Just a place in a world."""

    def __init__(self, rank: int, world: int = 4) -> None:
        self.global_rank, self.world_size = rank, world


def pauses(faults: SpeedFaults, rank: int, batches: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr("lightning_async.callbacks.speed_faults.time.sleep", slept.append)
    trainer: Any = FakeTrainer(rank)
    module: Any = None
    faults.on_train_start(trainer, module)
    for number in range(batches):
        faults.on_train_batch_start(trainer, module, None, number)
    monkeypatch.undo()
    return slept


def fit(*callbacks: SpeedFaults, epochs: int = 1) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        limit_train_batches=5,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
    )
    trainer.fit(BoringModel())
    return trainer


def test_slow_ranks_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = SpeedFaults(step_seconds=0.02, slow={3: 4.0})
    assert pauses(faults, 0, 3, monkeypatch) == [0.02] * 3
    assert pauses(faults, 3, 3, monkeypatch) == [0.08] * 3


def test_schedules_come_and_go_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = SpeedFaults(step_seconds=0.5, slow={1: 3.0}, schedule={1: [(2, 4.0), (4, 1.0)]}, repeat=6)
    assert pauses(faults, 0, 8, monkeypatch) == [0.5] * 8
    assert pauses(faults, 1, 8, monkeypatch) == [1.5, 1.5, 2.0, 2.0, 0.5, 0.5, 1.5, 1.5]


def test_stalls_come_as_often_as_asked_and_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = SpeedFaults(stall={2: (20, 0.5)})
    slept = pauses(faults, 2, 4000, monkeypatch)
    assert set(slept) == {0.0, 0.5}
    assert slept.count(0.5) == pytest.approx(200, rel=0.2)
    assert slept == pauses(SpeedFaults(stall={2: (20, 0.5)}), 2, 4000, monkeypatch)
    assert set(pauses(faults, 1, 100, monkeypatch)) == {0.0}


def test_spread_keeps_the_mean_and_follows_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(seed: int, rank: int) -> list[float]:
        return pauses(SpeedFaults(step_seconds=1.0, sigma=0.5, seed=seed), rank, 4000, monkeypatch)

    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    first = drawn(7, 0)
    assert first == drawn(7, 0)
    assert first != drawn(8, 0)
    assert first != drawn(7, 1)
    assert fmean(first) == pytest.approx(1.0, abs=0.05)
    assert min(first) < 0.5 < 1.5 < max(first)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_fails_where_asked_counting_over_epochs() -> None:
    with pytest.raises(RuntimeError, match="rank 0 fails at batch 7, as asked"):
        fit(SpeedFaults(fail={0: 7}), epochs=2)
    assert fit(SpeedFaults(fail={0: 7})).global_step == 5


def test_a_second_fit_counts_from_0() -> None:
    faults = SpeedFaults(fail={0: 7})
    fit(faults)
    fit(faults)


def test_holding_the_lock_costs_other_threads_and_sleeping_does_not() -> None:
    def ticks_beside(faults: SpeedFaults) -> int:
        ticks, over = 0, threading.Event()

        def tick() -> None:
            nonlocal ticks
            while not over.is_set():
                ticks += 1
                time.sleep(0.0005)

        thread = threading.Thread(target=tick)
        thread.start()
        try:
            faults._pass(0.3)
        finally:
            over.set()
            thread.join()
        return ticks

    assert ticks_beside(SpeedFaults(hold_gil=True)) < 0.5 * ticks_beside(SpeedFaults())


def _longest_gap_of_another_thread() -> float:
    gaps, over = [0.0], threading.Event()

    def tick() -> None:
        last = time.monotonic()
        while not over.is_set():
            time.sleep(0.005)
            last, before = time.monotonic(), last
            gaps.append(last - before)

    thread = threading.Thread(target=tick)
    thread.start()
    freeze_process(0.5)
    over.set()
    thread.join()
    return max(gaps)


def test_a_freeze_stops_the_whole_process() -> None:
    (gap,) = run(1, _longest_gap_of_another_thread)
    assert 0.45 < gap < 5


def test_a_freeze_comes_once_and_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[float] = []
    monkeypatch.setattr("lightning_async.callbacks.speed_faults.freeze_process", frozen.append)
    fit(SpeedFaults(freeze={0: (2, 0.5)}), epochs=2)
    assert frozen == [0.5]


def test_travels_to_other_processes() -> None:
    faults = pickle.loads(pickle.dumps(SpeedFaults(step_seconds=0.02, slow={1: 4.0}, freeze={2: (1, 0.5)})))
    assert (faults.slow, faults.freeze) == ({1: 4.0}, {2: (1, 0.5)})


def test_a_rank_that_is_not_there() -> None:
    with pytest.raises(MisconfigurationException, match="names rank 3, but the ranks of this run are 0 to 0"):
        fit(SpeedFaults(step_seconds=0.001, slow={3: 4.0}))


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"step_seconds": -1.0}, "`step_seconds` must be at least 0, got -1.0"),
        ({"step_seconds": float("nan")}, "`step_seconds` must be at least 0, got nan"),
        ({"sigma": -0.1, "step_seconds": 1.0}, "`sigma` must be at least 0, got -0.1"),
        ({"slow": {0: 4.0}}, "`slow` and `sigma` act on `step_seconds`, which is 0"),
        ({"sigma": 0.5}, "`slow` and `sigma` act on `step_seconds`, which is 0"),
        ({"slow": {0: 0.0}, "step_seconds": 1.0}, "`slow` must hold positive factors, got 0.0 for rank 0"),
        ({"slow": {-1: 2.0}, "step_seconds": 1.0}, "ranks count from 0, got -1"),
        ({"freeze": {0: (-1, 1.0)}}, "`freeze` must hold"),
        ({"freeze": {0: (1, 0.0)}}, "`freeze` must hold"),
        ({"schedule": {0: [(0, 2.0)]}}, "`slow`, `schedule` and `sigma` act on `step_seconds`, which is 0"),
        ({"schedule": {0: [(5, 2.0), (3, 1.0)]}, "step_seconds": 1.0}, "`schedule` must hold batches from 0 that grow"),
        ({"schedule": {0: []}, "step_seconds": 1.0}, "`schedule` must hold batches from 0 that grow, got"),
        ({"schedule": {0: [(1.5, 2.0)]}, "step_seconds": 1.0}, r"`schedule` must hold batches from 0 .* got \[1.5\]"),
        ({"schedule": {0: [(0, 0.0)]}, "step_seconds": 1.0}, "`schedule` must hold positive factors, got 0.0 at 0"),
        ({"repeat": 5}, "`repeat` must be an integer of at least 1 and needs a `schedule`, got 5"),
        ({"schedule": {0: [(0, 2.0)]}, "repeat": 1.5, "step_seconds": 1.0}, "`repeat` must be an integer .* got 1.5"),
        ({"schedule": {0: [(0, 2.0), (500, 1.0)]}, "repeat": 400, "step_seconds": 1.0}, "entry at batch 500 .* never"),
        ({"schedule": {0: [(0, 2.0), (400, 1.0)]}, "repeat": 400, "step_seconds": 1.0}, "entry at batch 400 .* never"),
        ({"schedule": {1: [100, 6.0]}}, r"`schedule` must be {rank: \[\(batch, factor\), ...\]}, got 100 for rank 1"),
        ({"schedule": {1: 6.0}}, r"`schedule` must be {rank: \[\(batch, factor\), ...\]}, got 6.0 for rank 1"),
        ({"stall": {1: 50}}, r"`stall` must be {rank: \(every, seconds\)}, got 50 for rank 1"),
        ({"stall": {1: (50, "1")}}, r"`stall` must be {rank: \(every, seconds\)}, got \(50, '1'\) for rank 1"),
        ({"freeze": {1: 5.0}}, r"`freeze` must be {rank: \(batch, seconds\)}, got 5.0 for rank 1"),
        ({"freeze": {1: (2.5, 5.0)}}, "`freeze` must hold"),
        ({"fail": {1: "2"}}, "`fail` must hold batches, counted from 0, got '2' for rank 1"),
        ({"slow": {"3": 4.0}, "step_seconds": 1.0}, "ranks count from 0, got '3' in `slow`"),
        ({"slow": {3: "4"}, "step_seconds": 1.0}, "`slow` must hold positive factors, got '4' for rank 3"),
        ({"slow": [4.0], "step_seconds": 1.0}, r"`slow` must be a dictionary by rank, got \[4.0\]"),
        ({"sigma": "1"}, "`sigma` must be at least 0, got '1'"),
        ({"stall": {1: (0.5, 1.0)}}, "`stall` must hold .* got .0.5, 1.0. for rank 1"),
        ({"fail": {0: -1}}, "`fail` must hold batches, counted from 0, got -1"),
    ],
)
def test_wrong_values(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SpeedFaults(**knobs)
