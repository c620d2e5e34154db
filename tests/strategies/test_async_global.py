"""`async_global` from a user's view: all ranks end equal, every sample is seen once, faults cost nobody time."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch

from lightning_async import AsyncGlobalStrategy, SpeedFaults
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import run


def _fit(devices: int, knobs: dict[str, Any], slow: float) -> dict[str, Any]:
    torch.manual_seed(int(os.environ["RANK"]))
    lit = Lit()
    faults = SpeedFaults(step_seconds=0.002, slow={devices - 1: slow})
    strategy = AsyncGlobalStrategy(**knobs)
    t = trainer(devices, strategy=strategy, callbacks=[faults])
    t.fit(lit, loader(), loader(10, shuffle=False))
    return {
        "weights": weights(lit),
        "seen": lit.seen,
        "val": float(t.callback_metrics["val"]),
        "train": float(t.callback_metrics["train_epoch"]),
        "arrivals": len(strategy.arrivals()),
    }


CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (3, {"local_steps": 2, "wire": "bf16", "shards": 2}),
    (3, {"local_steps": "epoch", "outer_momentum": 0.5, "outer_lr": 0.7}),
    (2, {"mode": "sync", "pace": 4}),
    (2, {"attenuation": "paper", "accuracy_weight": "train"}),
]


@pytest.mark.parametrize(("devices", "knobs"), CASES)
def test_all_ranks_end_equal_and_every_sample_is_seen_once(devices: int, knobs: dict[str, Any]) -> None:
    ends = run(devices, _fit, devices, knobs, 1.0 if knobs.get("mode") == "sync" else 3.0)
    for end in ends[1:]:
        for key in ("weights", "val", "train"):
            assert end[key] == ends[0][key]
    seen = Counter(index for end in ends for index in end["seen"])
    assert set(seen.values()) == {2}
    assert len(seen) == 240
    if knobs.get("mode") != "sync":
        assert all(end["arrivals"] for end in ends)
