"""A small LightningModule, its data and a quiet Trainer, for tests on several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

from lightning_async import GossipRingStrategy

INPUTS = torch.randn(240, 8, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS @ torch.arange(1.0, 9.0).reshape(8, 1)


class Lit(L.LightningModule):
    """Linear regression that logs in every way users do, and remembers which samples it saw."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        self.lr = lr
        self.seen: list[int] = []
        self.metric = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index, x, y = batch
        self.seen += index.tolist()
        loss = (self.layer(x) - y).square().mean()
        self.log("train", loss, on_step=True, on_epoch=True, sync_dist=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        _, x, y = batch
        loss = (self.layer(x) - y).square().mean()
        self.metric.update(loss, weight=len(x))
        self.log("metric", self.metric)
        self.log("val", loss, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        _, x, y = batch
        self.log("test", (self.layer(x) - y).square().mean(), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[1])  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


class ByHand(Lit):
    """Steps by itself: its `training_step` returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Ending(Lit):
    """Each rank writes down what it holds at the end of a fit."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def on_fit_end(self) -> None:
        Path(self.folder, f"end{self.global_rank}.txt").write_text(repr(weights(self)))


class Numbers(IterableDataset[Any]):
    """A rank's own stream that knows where it stands."""

    def __init__(self, length: float) -> None:
        self.at, self.length = 0, length

    def __iter__(self) -> Iterator[Any]:
        while self.at < self.length:
            self.at += 1
            yield self.at - 1, INPUTS[(self.at - 1) % 240], TARGETS[(self.at - 1) % 240]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def loader(batch_size: int = 4, *, shuffle: bool = True, n: int = 240, **options: Any) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(n), INPUTS[:n], TARGETS[:n])
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle, **options)


def trainer(devices: int, **options: Any) -> L.Trainer:
    strategy = options.pop("strategy", None) or GossipRingStrategy(**options.pop("knobs", {}))
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
        "max_epochs": 2,
        "accelerator": "cpu",
    }
    return L.Trainer(devices=devices, strategy=strategy, **{**quiet, **options})


def weights(module: L.LightningModule) -> list[float]:
    return [float(x) for p in [*module.parameters(), *module.buffers()] for x in p.detach().flatten()]
