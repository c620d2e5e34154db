"""A run from a user's view: all ranks end equal, every sample is seen once an epoch, every stage works."""

from __future__ import annotations

import logging.handlers
import math
import os
import pickle
import signal
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_async import GossipRingStrategy, SpeedFaults
from lightning_async.transport.cluster import ClusterCarrier
from tests.strategies import piped
from tests.strategies.lit import INPUTS, TARGETS, Lit, loader, trainer, weights
from tests.strategies.ranks import Forked, run


def _fit(devices: int, knobs: dict[str, Any], slow: float, batch: int) -> dict[str, Any]:
    torch.manual_seed(int(os.environ["RANK"]))  # ranks begin unequal, and the strategy makes them equal
    lit = Lit()
    lit.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    faults = SpeedFaults(step_seconds=0.002, slow={devices - 1: slow})
    t = trainer(devices, knobs=knobs, callbacks=[faults])
    t.fit(lit, loader(batch), loader(40, shuffle=False))
    pickle.dumps(lit.metric)  # as the user made it
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


@pytest.mark.few(2)
@pytest.mark.parametrize(("mode", "devices", "at_meeting"), CASES)
def test_all_ranks_end_equal_and_every_sample_is_seen_once(mode: str, devices: int, at_meeting: str) -> None:
    hears = devices > 1 and mode in ("pairwise", "push_sum")
    knobs, slow = {"mode": mode, "at_meeting": at_meeting}, 1.0 if mode == "sync" else 3.0
    ends = run(devices, _fit, devices, knobs, slow, 4 if hears else 8)
    for end in ends[1:]:
        for key in ("weights", "val", "metric", "train"):
            assert end[key] == ends[0][key]
    seen = Counter(index for end in ends for index in end["seen"])
    assert set(seen.values()) == {2}
    assert len(seen) == 240
    if hears:
        assert all(end["arrivals"] for end in ends)


def _all_stages(folder: str) -> dict[str, Any]:
    lit = Lit()
    saved = ModelCheckpoint(folder, monitor="val", save_top_k=1, save_last=True, filename="{epoch}-{step}")
    newest = ModelCheckpoint(Path(folder) / "newest")
    faults = SpeedFaults(step_seconds=0.002, slow={1: 3.0})
    callbacks = [saved, newest, EarlyStopping("val", patience=5), faults]
    t = trainer(2, enable_checkpointing=True, callbacks=callbacks, max_epochs=3)
    held_out = loader(40, shuffle=False)
    t.fit(lit, loader(8), held_out)
    fitted = weights(lit)
    t.validate(lit, held_out)
    t.test(lit, held_out, ckpt_path="best")
    tested = float(t.callback_metrics["test"])
    predicted = t.predict(lit, held_out)
    t.fit_loop.max_epochs = 4
    t.fit(lit, loader(8), held_out)
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


def _whole_batches() -> tuple[list[int], int]:
    data, held_out = TensorDataset(torch.arange(240), INPUTS[:240], TARGETS[:240]), loader(40, shuffle=False)
    lit = Lit()
    t = trainer(2, max_epochs=3, callbacks=[SpeedFaults(step_seconds=0.001)])
    t.fit(lit, DataLoader(data, sampler=BatchSampler(RandomSampler(data), 8, False), batch_size=None), held_out)
    return lit.seen, t.global_step


def test_a_loader_without_a_batch_size_has_every_epoch() -> None:
    """Its sampler gives whole batches: Lightning tells the epoch to that one."""
    ends = run(2, _whole_batches)
    assert Counter(index for seen, _ in ends for index in seen) == dict.fromkeys(range(240), 3)
    assert [steps for _, steps in ends] == [45, 45]


def test_who_comes_late_to_a_later_stage_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a rank 0 does that uploads its checkpoint first: at the first stage all were there a moment ago."""
    late: list[float | None] = []

    class Watched(ClusterCarrier):
        def __init__(self, **knobs: Any) -> None:
            late.append(knobs["late"])
            super().__init__(**knobs)

    monkeypatch.setattr("lightning_async.strategies.office.ClusterCarrier", Watched)
    t = trainer(1, max_epochs=1)
    t.fit(Lit(), loader(), loader(40, shuffle=False))
    t.validate(Lit(), loader(40, shuffle=False), verbose=False)
    t.validate(Lit(), loader(40, shuffle=False), verbose=False)
    assert late == [None, math.inf, math.inf]


def _for_ever(folder: str, piped_too: bool) -> int:
    """No bound but those that nobody can set."""
    knobs = {**dict.fromkeys(("grace", "silence", "patience"), math.inf), "timeout": timedelta.max}
    if piped_too:
        t = piped.trainer(2, knobs={"waiting_timeout": math.inf, **knobs}, max_epochs=1)
        t.fit(piped.Piped(), piped.loader(n=16), piped.loader(n=8))
    else:
        more = {"enable_checkpointing": True, "plugins": [AsyncCheckpointIO()], "callbacks": [ModelCheckpoint(folder)]}
        t = trainer(2, knobs={"meeting_timeout": math.inf, **knobs}, max_epochs=1, **more)
        t.fit(Lit(), loader(n=40), loader(8, n=8, shuffle=False))
    return t.global_step


@pytest.mark.few(1)
@pytest.mark.parametrize("piped_too", [False, True])
def test_what_bounds_waits_may_be_endless(piped_too: bool, tmp_path: Path) -> None:
    with Forked(2, _for_ever, str(tmp_path), piped_too, store=True) as forked:
        first, second = forked.values()
    assert first == second > 0


def _stops_early() -> int:
    lit = Lit()
    early = EarlyStopping("val", patience=1, min_delta=1e9)
    t = trainer(2, callbacks=[early, SpeedFaults(step_seconds=0.002, slow={1: 4.0})], max_epochs=6, min_epochs=4)
    t.fit(lit, loader(8), loader(40, shuffle=False))
    return t.current_epoch


def test_early_stopping_before_min_epochs() -> None:
    assert run(2, _stops_early) == [4, 4]


def _dies(folder: str, dead: int) -> dict[str, Any]:
    lit = Lit()
    rank = int(os.environ["RANK"])

    class Dies(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if rank == dead and trainer.current_epoch == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    saved = ModelCheckpoint(folder, filename="{epoch}")
    faults = SpeedFaults(step_seconds=0.004)
    t = trainer(3, enable_checkpointing=True, callbacks=[saved, faults, Dies()], max_epochs=3, knobs={"silence": 0.5})
    held_out = loader(40, shuffle=False)
    told = logging.handlers.BufferingHandler(100)
    logging.getLogger("lightning_async").addHandler(told)
    t.fit(lit, loader(), held_out)
    try:
        t.validate(lit, held_out)
        sentence = ""
    except RuntimeError as error:
        sentence = str(error)
    words = [record.getMessage() for record in told.buffer]
    return {"weights": weights(lit), "best": saved.best_model_path, "sentence": sentence, "told": words}


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dead", [0, 2])
def test_the_others_go_on_after_a_death_and_the_first_that_lives_saves(dead: int, tmp_path: Path) -> None:
    with Forked(3, _dies, str(tmp_path), dead, store=True) as forked:
        results = forked.results(60)
    assert results[dead].kind == "gone"
    living = [r.value for r in results if r.kind is None]
    assert len(living) == 2, results
    assert living[0]["weights"] == living[1]["weights"]
    (word,) = [word for end in living for word in end["told"]]
    assert f"rank {dead} is dead: its connection was closed" in word
    loaded = Lit()
    loaded.load_state_dict(torch.load(living[0]["best"], weights_only=True)["state_dict"])
    assert weights(loaded) == living[0]["weights"]
    assert all(f"rank {dead} died in an earlier stage" in end["sentence"] for end in living)
