"""A run from a user's view: all ranks end equal, every sample is seen once an epoch, every stage works."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_async import GossipRingStrategy, SpeedFaults
from tests.strategies.lit import Lit, loader, trainer, weights
from tests.strategies.ranks import run


def _fit(devices: int, knobs: dict[str, Any], slow: float) -> dict[str, Any]:
    torch.manual_seed(100 + devices)  # ranks begin unequal unless the strategy makes them equal
    lit = Lit()
    faults = SpeedFaults(step_seconds=0.002, slow={devices - 1: slow})
    t = trainer(devices, knobs=knobs, callbacks=[faults])
    t.fit(lit, loader(), loader(10, shuffle=False))
    strategy = t.strategy
    assert isinstance(strategy, GossipRingStrategy)
    return {
        "weights": weights(lit),
        "seen": lit.seen,
        "val": float(t.callback_metrics["val"]),
        "metric": float(t.callback_metrics["metric"]),
        "train": float(t.callback_metrics["train_epoch"]),
        "arrivals": len(strategy.arrivals()),
        "steps": strategy.steps,
    }


CASES = [
    (mode, devices, at_meeting)
    for mode in ("pairwise", "push_sum", "sync", "none")
    for devices, at_meeting in ((1, "adopt"), (2, "keep"), (3, "adopt"))
    if devices > 1 or mode == "pairwise"
]


@pytest.mark.parametrize(("mode", "devices", "at_meeting"), CASES)
def test_all_ranks_end_equal_and_every_sample_is_seen_once(mode: str, devices: int, at_meeting: str) -> None:
    ends = run(devices, _fit, devices, {"mode": mode, "at_meeting": at_meeting}, 1.0 if mode == "sync" else 3.0)
    for end in ends[1:]:
        for key in ("weights", "val", "metric", "train"):
            assert end[key] == ends[0][key]
    seen = Counter(index for end in ends for index in end["seen"])
    assert set(seen.values()) == {2}
    assert len(seen) == 240
    if devices > 1 and mode in ("pairwise", "push_sum"):
        assert all(end["arrivals"] for end in ends)


def _all_stages(folder: str) -> dict[str, Any]:
    lit = Lit()
    saved = ModelCheckpoint(folder, monitor="val", save_top_k=1, save_last=True, filename="{epoch}-{step}")
    newest = ModelCheckpoint(Path(folder) / "newest")
    faults = SpeedFaults(step_seconds=0.002, slow={1: 3.0})
    callbacks = [saved, newest, EarlyStopping("val", patience=5), faults]
    t = trainer(2, enable_checkpointing=True, callbacks=callbacks, max_epochs=3)
    held_out = loader(10, shuffle=False)
    t.fit(lit, loader(), held_out)
    fitted = weights(lit)
    t.validate(lit, held_out)
    t.test(lit, held_out, ckpt_path="best")
    tested = float(t.callback_metrics["test"])
    predicted = t.predict(lit, held_out)
    t.fit_loop.max_epochs = 4
    t.fit(lit, loader(), held_out)
    return {
        "fitted": fitted,
        "refitted": weights(lit),
        "best": saved.best_model_path,
        "newest": newest.best_model_path,
        "test": tested,
        "predicted": len(predicted or []),
    }


@pytest.mark.filterwarnings(
    "ignore:Using `DistributedSampler` with the dataloaders", "ignore:Checkpoint directory", "ignore:.*multiple `Model"
)
def test_fit_validate_test_predict_and_fit_again_on_one_trainer(tmp_path: Path) -> None:
    first, second = run(2, _all_stages, str(tmp_path))
    for key in ("fitted", "refitted", "best", "newest", "test"):
        assert first[key] == second[key]
    assert Path(first["best"]).exists()
    loaded = Lit()
    loaded.load_state_dict(torch.load(first["newest"], weights_only=True)["state_dict"])
    assert weights(loaded) == first["refitted"]
