"""Runs whose checkpoints are cuts, what each rank sees of them, and what the files must say."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_async import GossipRingStrategy, SpeedFaults
from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.cut import unpacked
from lightning_async.algorithms.gossip import gossip
from lightning_async.replica import Replica
from lightning_async.strategies.base import AsyncStrategy
from tests.strategies.lit import INPUTS, TARGETS, trainer
from tests.strategies.resumable import (
    Draws,
    assert_nothing_over,
    files_of,
    look_when_put_back,
    rank,
)

IGNORED = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty",
    "ignore:.*multiple `ModelCheckpoint`",
    "ignore:You defined a `validation_step`",
    "ignore:The dirpath has changed",
)
N, EVERY, SAMPLES, BATCH = 3, 8, 960, 4
"""Ranks; steps of the run between two cuts; samples of its one epoch: 80 steps."""


def samples(n: int = SAMPLES) -> DataLoader[Any]:
    """In their order, so that positions are samples."""
    data = TensorDataset(torch.arange(n), INPUTS.repeat(n // 240, 1), TARGETS.repeat(n // 240, 1))
    return DataLoader(data, BATCH)


class Stepwise(Draws):
    """The learning rate goes by the run's steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Diary(L.Callback):
    """What happens on this rank: behind each batch, how many had met, which cut was open, how many files there were."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(exist_ok=True)
        self.entries: list[tuple[int, int | None, int]] = []
        self.seen: list[int] = []
        self.named: list[tuple[int, str, bool]] = []  # how many met; the newest checkpoint's name; whether it is there
        self.saved_at: list[int] = []
        self.rate = 0.0  # at the first batch
        self.stops: Callable[[L.Trainer, int], None] = lambda trainer, batches: None

    def on_train_batch_start(self, trainer: L.Trainer, *batch: Any) -> None:
        self.rate = self.rate or trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncStrategy)
        assert strategy.clock.progress is not None
        met, number, there = strategy.clock.progress.meetings, open_cut(strategy), len(list(self.folder.glob("*.ckpt")))
        self.entries.append((met, number, there))
        self.seen += batch[0].tolist()
        named = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        self.named += [(met, named, Path(named).exists())] if named else []
        self.saved_at.append(strategy.cuts.saved_at)
        (self.folder / f"diary{rank()}.json").write_text(json.dumps([len(self.entries), number]))
        self.stops(trainer, len(self.entries))


def open_cut(strategy: AsyncStrategy) -> int | None:
    """The number of the cut that this rank has begun and not ended."""
    gathering = strategy.cuts.first.gathering
    return None if gathering is None else gathering.number


def diary_of(folder: Path, rank: int) -> tuple[int, int | None]:
    """How far it has come, for who looks from outside; it may be about to write."""
    try:
        batches, number = json.loads((folder / f"diary{rank}.json").read_text())
    except (OSError, ValueError):
        return 0, None
    return batches, number


def wait_for(condition: Callable[[], bool], seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def fit(
    folder: str,
    mode: str = "push_sum",
    path: str | None = None,
    *,
    every: int = EVERY,
    stops: Callable[[L.Trainer, int], None] | None = None,
    io: Any = None,
    module: Callable[[], L.LightningModule] = Stepwise,
    options: dict[str, Any] | None = None,
    step: float = 0.02,
    n: int = SAMPLES,
    data: DataLoader[Any] | None = None,
    knobs: dict[str, Any] | None = None,
    **saver: Any,
) -> dict[str, Any]:
    diary, world = Diary(folder), int(os.environ["WORLD_SIZE"])
    diary.stops = stops or diary.stops
    saves = ModelCheckpoint(folder, every_n_train_steps=every, **{"filename": "{step}", "save_top_k": -1, **saver})
    t = trainer(
        world,
        knobs={"mode": mode, "saves": "cut", **(knobs or {})},
        max_epochs=1,
        enable_checkpointing=True,
        callbacks=[diary, saves, SpeedFaults(step_seconds=step, slow={} if world == 1 else {1: 2.0})],
        plugins=[] if io is None else [io],
        **(options or {}),
    )
    restored = look_when_put_back(t, state_of)
    lit = module()
    t.fit(lit, samples(n) if data is None else data, ckpt_path=path)
    weights = Replica(lit.parameters()).weights().tolist()
    told = {"restored": restored[0], "entries": diary.entries, "seen": diary.seen, "weights": weights}
    told |= {"named": diary.named, "saved_at": diary.saved_at}
    return told | {"last": saves.last_model_path, "best": saves.best_model_path, "rate": diary.rate}


def state_of(t: L.Trainer) -> dict[str, Any]:
    strategy = t.strategy
    assert isinstance(strategy, GossipRingStrategy)
    letters = [letter for box in getattr(strategy.office.mail, "_boxes", {}).values() for letter in box]
    return {
        "own": strategy.replica.own.tolist(),
        "mass": strategy.algorithm.mass,
        "letters": [(letter.peer, letter.message.kind, letter.message.weight) for letter in letters],
        "steps": strategy.steps,
        "global_step": t.global_step,
    }


def seen_by(told: list[dict[str, Any]]) -> list[int]:
    return [sample for one in told for sample in one["seen"]]


def cuts_in(folder: Path) -> list[Path]:
    """The checkpoints that were saved between meetings, the oldest first."""
    paths = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2] or 0))
    return [path for path in paths if all("cut" in own for own in files_of(path).values())]


def check_conserved(path: Path, mode: str, n: int = N) -> None:
    """The main file is the mass-weighted mean of what all had, and of what was under way to them."""
    check_consensus(path, mode, n)
    check_counts(torch.load(path, weights_only=True), files_of(path))


def check_consensus(path: Path, mode: str, n: int, rounding: float = 1e-5) -> None:
    """Of the weights and of the buffers."""
    main, own = torch.load(path, weights_only=True), files_of(path)
    parts = {r: unpacked(file["cut"]) for r, file in own.items()}
    assert len({part.number for part in parts.values()}) == 1
    assert len(parts) == n
    method = gossip(mode)  # type: ignore[arg-type]
    method.mass = UNIT * BATCH
    total, mass = torch.zeros_like(own[0]["weights"], dtype=torch.float64), 0
    for r, file in own.items():
        held = file["parts"]["algorithm"]["mass"]
        total, mass = total + file["weights"].double() * held / UNIT, mass + held
        for letter in parts[r].letters:
            if (worth := method.worth(letter.message)) is not None:
                total, mass = total + worth.vector, mass + worth.mass
    assert mass == n * UNIT * BATCH
    lit = Draws()
    lit.load_state_dict(main["state_dict"])
    mean = (total / mass * UNIT).float()
    torch.testing.assert_close(Replica(lit.parameters()).flat, mean, rtol=rounding, atol=rounding / 10)
    means = [torch.stack([file["buffers"][name] for file in own.values()]) for name, _ in lit.named_buffers()]
    for mean, buffer in zip(means, lit.buffers(), strict=True):
        if buffer.is_floating_point():
            torch.testing.assert_close(buffer, mean.float().mean(0), rtol=rounding, atol=rounding)


def check_counts(main: dict[str, Any], own: dict[int, Any]) -> None:
    """The run's step is that of all ranks' batches, and so is what is done of the epoch."""
    shared = main["lightning_async"]
    batches = sum(file["steps"] for file in own.values())
    assert shared["progress"]["agreed"][:2] == [batches, batches]
    assert main["global_step"] == batches // len(own)
    done = sum(int(amount) for _, amount in shared["data"]["done"])
    assert done == batches * BATCH
    for file in own.values():
        own_alone = {"scheduled": 0, "ended": file["waits"]}
        assert file["parts"]["progress"] | {"scheduled": 0} == shared["progress"] | own_alone


def resumed_by_others(folder: str, mode: str, path: str) -> dict[str, Any]:
    warnings.filterwarnings("ignore", message=".*does not go on to the bit")
    return fit(folder, mode, path)


def assert_nothing_over_but(folder: Path, name: str) -> None:
    for path in folder.glob(f"{name}*"):
        path.unlink()
    assert_nothing_over(folder)


def done_of(main: dict[str, Any]) -> list[int]:
    ranges = main["lightning_async"]["data"]["done"].tolist()
    return [position for at, amount in ranges for position in range(at, at + amount)]


def check_resumed(cut: Path, main: dict[str, Any], own: dict[int, Any], back: list[dict[str, Any]]) -> None:
    """Each rank is what it was, with what was under way to it as its first mail; each sample is trained on once."""
    for r, file in own.items():
        restored = back[r]["restored"]
        assert restored["own"] == file["weights"].tolist(), "its own weights"
        assert restored["mass"] == file["parts"]["algorithm"]["mass"]
        assert restored["steps"] == file["steps"]
        assert restored["global_step"] == main["global_step"]
        letters = [(letter["peer"], letter["message"]["kind"]) for letter in file["cut"]["letters"]]
        assert sorted(one[:2] for one in restored["letters"]) == sorted(letters)
    ahead = [math.log(one["rate"] / 0.01) / math.log(0.99) - main["global_step"] for one in back]
    assert all(-1e-3 < steps < 10 for steps in ahead), "no schedule is behind; who recorded last may have heard of more"
    mass = sum(one["restored"]["mass"] + sum(weight for _, kind, weight in one["restored"]["letters"] if kind == 16)
               for one in back) if main["lightning_async"]["algorithm"] == "PushSum" else N * UNIT * BATCH  # fmt: skip
    assert mass == N * UNIT * BATCH
    assert sorted(done_of(main) + seen_by(back)) == list(range(SAMPLES))
    assert len({tuple(one["weights"]) for one in back}) == 1, "at the end all are the consensus"
