"""Entries are exact at meetings and never go back; a slow rank 0 slows neither them nor what is saved."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_async import SpeedFaults
from tests.strategies import piped
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import run

STEPS, EVERY, MEETS = 60, 10, 15


class Keys(L.Callback):
    """Which entries this rank had by the end of each batch; when its batches began, and when it came to each meeting.

    It stands before the faults, whose pauses are parts of the batches.
    """

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.began: list[float] = []
        self.came: list[float] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        meet = strategy.meet

        def come() -> Any:
            self.came.append(time.monotonic())
            return meet()

        strategy.meet = come

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.began.append(time.monotonic())

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.keys |= {key for key in trainer.logged_metrics if key.startswith("progress/")}


def logged(folder: Path, slow: int, options: dict[str, Any]) -> dict[str, Any]:
    keys = Keys()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=MEETS, save_top_k=-1)
    faults = SpeedFaults(step_seconds=0.02, slow={slow: 8.0})  # so slow that on a busy machine too it is the slow one
    logger = CSVLogger(folder, name="", version="")
    one = trainer(
        2,
        callbacks=[keys, faults, saver],
        logger=logger,
        log_every_n_steps=EVERY,
        enable_checkpointing=True,
        max_epochs=-1,
        **options,
    )
    one.fit(Lit(), loader(), loader(40, shuffle=False))
    return {"keys": sorted(keys.keys), "began": keys.began, "came": keys.came}


def waits(quick: dict[str, Any], slow: dict[str, Any]) -> list[int]:
    """At each meeting, how many batches the slow rank began when the quick one had come."""
    meetings = zip(quick["came"], slow["came"], strict=True)
    return [sum(mine < began < theirs for began in slow["began"]) for mine, theirs in meetings]


def entries(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in rows if "progress/samples" in row]


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Experiment logs directory")
@pytest.mark.parametrize("slow", [0, 1])
def test_what_is_logged_was_done_and_a_slow_rank_0_slows_nobody(slow: int, tmp_path: Path) -> None:
    found = run(2, logged, tmp_path, slow, {"max_steps": STEPS})
    rows = entries(tmp_path)
    assert found[0]["keys"] == found[1]["keys"] == ["progress/batch", "progress/samples", "progress/updates"]
    for name in ("samples", "updates"):
        counts = [row[f"progress/{name}"] for row in rows]
        assert counts == sorted(counts)
    met = {int(row["step"]) + 1: row for row in rows if (int(row["step"]) + 1) % MEETS == 0}
    assert met.keys() >= {15, 30, 45, 60}, "an entry at each meeting"
    for steps, row in met.items():
        assert (row["progress/updates"], row["progress/samples"]) == (2 * steps, 8 * steps)
        assert row["progress/batch"] == 8.0
    assert len({int(row["step"]) for row in rows} & set(range(EVERY - 1, STEPS, EVERY))) >= 3, "and between meetings"
    saved = sorted(int(path.stem.removeprefix("step=")) for path in tmp_path.glob("*.ckpt"))
    assert saved == [15, 30, 45, 60]
    fast, slowed = (len(found[rank]["began"]) for rank in (1 - slow, slow))
    assert fast + slowed == 2 * STEPS
    assert fast > 2 * slowed, f"nobody goes at the pace of the slow one: {fast}, {slowed}"
    _, *behind = waits(found[1 - slow], found[slow])  # the way to the first is shared out before speeds are known
    assert max(behind) <= 2, "nor waits for more than the slow one ends or was late by"


def accumulated(folder: Path) -> dict[str, Any]:
    logger = CSVLogger(folder, name="", version="")
    one = trainer(2, logger=logger, accumulate_grad_batches=3, max_steps=8, max_epochs=-1, log_every_n_steps=1)
    one.fit(Lit(), loader(), loader(40, shuffle=False))
    return {}


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_the_effective_batch_of_accumulated_steps(tmp_path: Path) -> None:
    run(2, accumulated, tmp_path)
    last = entries(tmp_path)[-1]
    assert last["progress/updates"] == 16
    assert 23.0 <= last["progress/batch"] <= 25.0


def piped_through(folder: Path, devices: int, replicas: int, epochs: int, resumes: bool) -> dict[str, float]:
    saver = ModelCheckpoint(folder / "saved", filename=f"{epochs}")
    one = piped.trainer(
        devices,
        knobs={"replicas": replicas},
        callbacks=[saver],
        logger=CSVLogger(folder / str(epochs), name="", version=""),
        log_every_n_steps=1,
        enable_checkpointing=True,
        max_epochs=epochs,
    )
    one.fit(piped.Piped(), piped.loader(), ckpt_path=str(folder / "saved" / "2.ckpt") if resumes else None)
    return {key: float(value) for key, value in one.logged_metrics.items() if key.startswith("progress/")}


@pytest.mark.few(0)
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:You defined a `validation_step`")
@pytest.mark.parametrize(("devices", "replicas"), [(4, 2), (2, 1), (1, 1)])
def test_a_pipeline_enters_what_its_replicas_have_trained_on(devices: int, replicas: int, tmp_path: Path) -> None:
    """60 samples an epoch, in batches of 8; a run that goes on counts on."""
    steps = 8 // replicas
    for before, epochs in ((0, 2), (2, 3)):
        (last, *_) = run(devices, piped_through, tmp_path, devices, replicas, epochs, before > 0)
        assert (last["progress/samples"], last["progress/updates"]) == (60 * epochs, steps * epochs)
        assert last["progress/batch"] == 60 / steps
        rows = entries(tmp_path / str(epochs))
        for name in ("samples", "updates"):
            counts = [row[f"progress/{name}"] for row in rows]
            assert counts == sorted(counts)
        assert {int(row["step"]) for row in rows} >= set(range(before * steps, epochs * steps))
        if replicas > 1:  # in between it is that of the last rest, and before the first one it is not known
            known = [row["progress/batch"] for row in rows if "progress/batch" in row]
            assert known == [15.0] * len(known)
            assert len(known) >= (epochs - before - 1) * steps


def unlogged(options: dict[str, Any]) -> int:
    one = trainer(2, max_epochs=1, **options)
    one.fit(Lit(), loader(n=40), loader(40, shuffle=False))
    return len([key for key in one.logged_metrics if key.startswith("progress/")])


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("options", [{"logger": False}, {"logger": None, "barebones": True}])
def test_without_a_logger_there_are_no_entries(options: dict[str, Any]) -> None:
    bare = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"))
    assert run(2, unlogged, {**(bare if "barebones" in options else {}), **options}) == [0, 0]
