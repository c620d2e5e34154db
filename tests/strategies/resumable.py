"""A module that draws random numbers of every kind, a loader that knows where it stands, and a look into a run."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_async import AsyncStrategy
from lightning_async.strategies.own_state import Moments, RandomStates
from lightning_async.strategies.rank_files import rank_file
from tests.strategies.lit import INPUTS, TARGETS, loader


class Draws(L.LightningModule):
    """Every step depends on python's, numpy's and torch's random states; the optimizer is Adam at changing rates."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = random.random() + np.random.rand()
        loss = (self.layer(batch[1]) - batch[2] + 0.01 * noise).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", (self.layer(batch[1]) - batch[2]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


class Stateful:
    """One rank's own batches, from where it stood."""

    def __init__(self, rank: int, world: int, batches: int = 10) -> None:
        self.rank, self.world, self.batches, self.at = rank, world, batches, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        torch.rand(1)  # a DataLoader draws the seed of its workers here
        return self._rest()

    def _rest(self) -> Iterator[Any]:
        self.at %= self.batches  # Lightning stops at the length, and does not ask once more
        while self.at < self.batches:
            first = (self.at * self.world + self.rank) * 4
            self.at += 1
            yield torch.arange(first, first + 4), INPUTS[first : first + 4], TARGETS[first : first + 4]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Samples(IterableDataset[Any]):
    """The same, sample by sample: a stream."""

    def __init__(self, batches: Stateful) -> None:
        self.batches, self.at = batches, 0
        self.n = 4 * batches.batches

    def __iter__(self) -> Iterator[Any]:
        self.at %= self.n
        while self.at < self.n:
            i = self.at * self.batches.world + self.batches.rank
            self.at += 1
            yield torch.tensor(i), INPUTS[i], TARGETS[i]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def stream(rank: int, world: int, batch_size: int = 4) -> DataLoader[Any]:
    """A loader over a stream that knows where it stands."""
    return DataLoader(Samples(Stateful(rank, world)), batch_size)


class Saves(Callback):
    """One checkpoint in this epoch: at a meeting at this batch of each rank's own, or where ModelCheckpoint takes one.

    Attributes:
        seen: What the rank then looked like.
        losses: How many losses it had seen.
    """

    def __init__(self, path: str, where: str = "batch", *, epoch: int = 1, batch: int = 0) -> None:
        self.path, self.where, self.epoch, self.batch = path, where, epoch, batch
        self.seen: dict[str, Any] = {}
        self.losses = -1

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.where == "batch" and (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            trainer.strategy.meet()
            self._save(trainer, module)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if self.where == "validation" and trainer.current_epoch == self.epoch and not trainer.sanity_checking:
            self._save(trainer, module)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if self.where == "epoch" and trainer.current_epoch == self.epoch:
            self._save(trainer, module)

    def _save(self, trainer: Any, module: Any) -> None:
        trainer.strategy.stepping.skipped.count = 5 + rank()  # as if fp16's scaler had skipped some
        self.seen = look(trainer)
        trainer.save_checkpoint(self.path)
        self.losses = len(getattr(module, "losses", ()))


def rank() -> int:
    return int(os.environ["RANK"])


def seed() -> None:
    """Each rank draws its own numbers, whatever the others draw."""
    L.seed_everything(100 + rank(), verbose=False)
    del os.environ["PL_GLOBAL_SEED"]  # the order of the data is seeded from it, and must be one


def files_of(path: Path) -> dict[int, dict[str, Any]]:
    """The own files that belong to the checkpoint at `path`."""
    shared = torch.load(path, weights_only=True)["lightning_async"]
    names = {r: rank_file(str(path), shared["save"], r) for r in shared["ranks"]}
    return {r: torch.load(name, weights_only=True) for r, name in names.items()}


def assert_nothing_over(folder: Path) -> None:
    """Beside each main file lie the files that it names, and an index; nothing else."""
    mains = [path for path in folder.glob("*.ckpt") if not path.is_symlink()]
    expected = set()
    for main in mains:
        shared = torch.load(main, weights_only=True)["lightning_async"]
        expected |= {main, Path(f"{main}.ranks"), Path(f"{main}.ranks/index.ckpt")}
        expected |= {Path(rank_file(str(main), shared["save"], r)) for r in shared["ranks"]}
    assert {path for path in folder.rglob("*") if not path.is_symlink()} == expected


def samples() -> DataLoader[Any]:
    """What is trained on: 20 batches an epoch."""
    return loader(n=80)


def held_out() -> DataLoader[Any]:
    """What is validated on."""
    return loader(10, shuffle=False, n=40)


def look_when_put_back(trainer: L.Trainer, at: Callable[[L.Trainer], Any] | None = None) -> list[Any]:
    """What the run looks like when everything is restored, right before its first batch."""
    strategy, seen = trainer.strategy, []
    assert isinstance(strategy, AsyncStrategy)
    put_back = strategy.checkpoints.put_back

    def and_look() -> None:
        put_back()
        seen.append((at or look)(trainer))

    strategy.checkpoints.put_back = and_look  # type: ignore[method-assign]
    return seen


def look(trainer: L.Trainer) -> dict[str, Any]:
    """All that a rank has of its own, and what it shows."""
    strategy = trainer.strategy
    assert isinstance(strategy, AsyncStrategy)
    return plain(
        {
            "shown": trainer.lightning_module.state_dict(),
            "own": strategy.replica.own.clone(),
            "optimizers": [optimizer.state_dict() for optimizer in strategy.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "moments": Moments(strategy).state_dict(),
            "algorithm": strategy.voice.state_dict(),
            "random": RandomStates(strategy.root_device).state_dict(),
            "steps": strategy.steps,
            "skipped": strategy.skipped_steps,
            "global_step": trainer.global_step,
            "epoch": trainer.current_epoch,
        }
    )


def plain(state: Any) -> Any:
    """Comparable by ==, to the bit."""
    if isinstance(state, Tensor):
        return (str(state.dtype), list(state.shape), state.detach().cpu().flatten().tolist())
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain(value) for value in state]
    return state
