"""Runs on several ranks with the callbacks that measure, and what they said on each rank."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from lightning_async import AdaptiveShrink, DelayStats, SpeedFaults, SpreadStats, TrafficStats
from lightning_async.arrival import Arrival
from tests.strategies.lit import Lit, loader, trainer

PAUSE, SLOW = 0.008, 10.0  # so slow that on a busy machine too it is the slow one


class Witness(Callback):
    """Counts on its own what the statistics count: steps, samples, arrivals, distances at meetings."""

    def __init__(self) -> None:
        self.steps = self.samples = 0
        self.own: list[float] = []
        self.consensus: list[float] = []
        self.arrivals: list[Arrival] = []
        self.spread = 0.0
        self.sent = (0, 0)
        self.bar: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        self.samples += len(batch[0])

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if hasattr(trainer.strategy, "arrivals"):
            self.arrivals += trainer.strategy.arrivals(self)
            self.spread = trainer.strategy.last_meeting["spread"]
            replica = trainer.strategy.replica
            for name, vector in (("own", replica.own), ("consensus", replica.flat)):
                kept = [part for part, (p, _) in zip(replica.parts(vector), replica.places, strict=True) if p.numel()]
                setattr(self, name, torch.cat(kept).tolist())
            counts = [count for row in trainer.strategy.traffic().values() for kind, count in row.items() if kind >= 16]
            self.sent = (sum(c.bytes_out for c in counts), sum(c.messages_out for c in counts))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.bar = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}


def fit(n: int, folder: str, method: str, knobs: dict[str, Any], epochs: int = 2) -> dict[str, Any]:
    """What the callbacks and the witness of this rank have at the end."""
    faults = SpeedFaults(step_seconds=PAUSE, slow={n - 1: SLOW})
    stats = [DelayStats(), AdaptiveShrink("inverse", healthy=0), TrafficStats(), SpreadStats(depth=2, every=0.05)]
    witness, logger = Witness(), CSVLogger(folder, name="", version="")
    options = {"callbacks": [faults, *stats, witness], "logger": logger, "max_epochs": epochs}
    if method == "ddp":
        t = trainer(n, strategy=DDPStrategy(process_group_backend="gloo"), **options)
    else:
        t = trainer(n, knobs=knobs, **options)
    t.fit(Lit(), loader(), loader(40, shuffle=False))
    return {
        "figures": {c.group: c.figures for c in stats},
        "stragglers": stats[0].stragglers,  # type: ignore[attr-defined]
        "steps": witness.steps,
        "samples": witness.samples,
        "arrivals": witness.arrivals,
        "spread": witness.spread,
        "own": witness.own,
        "consensus": witness.consensus,
        "bar": witness.bar,
        "sent": witness.sent,
        "wrapped": "training_step" in vars(t.strategy),
    }


def only_rank_0(folder: str) -> dict[str, float]:
    """A callback that the other rank does not have."""
    stats = [DelayStats(folder=folder)] if os.environ["RANK"] == "0" else []
    t = trainer(2, callbacks=stats)
    t.fit(Lit(), loader(), loader(40, shuffle=False))
    return stats[0].figures if stats else {}


class BothHeard(Callback):
    """Goes on when both ranks' sketches are known here."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        end = time.monotonic() + 20
        while batch_idx == 3 and len(trainer.strategy.board.notes()) < 2 and time.monotonic() < end:
            trainer.strategy.office.glance(0.1)


def sketched(folder: str) -> None:
    """Sketches at every step."""
    stats, logger = SpreadStats(every=1e-9), CSVLogger(folder, name="", version="")
    t = trainer(2, callbacks=[stats, BothHeard()], logger=logger, knobs={"balance": "equal"}, max_epochs=1)
    t.fit(Lit(), loader(), loader(40, shuffle=False))


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of the CSV logger."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def journal(folder: Path) -> list[dict[str, Any]]:
    """The lines of the journal."""
    return [json.loads(line) for line in (folder / "meetings.jsonl").read_text(encoding="utf-8").splitlines()]
