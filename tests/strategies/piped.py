"""A module whose middle is cut into stages: something before the call, random numbers everywhere, something after."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_async import DelayedPipelineStrategy

WIDTH = 6
SOURCE = torch.Generator().manual_seed(21)
INPUTS = torch.randn(64, WIDTH, generator=SOURCE)
TARGETS = INPUTS @ torch.randn(WIDTH, 2, generator=SOURCE)


class Piped(L.LightningModule):
    """Noise and a layer before the call, four blocks, a head and a loss behind them.

    `noisy`: how much of the noise that was drawn before the call the loss asks for.
    """

    def __init__(
        self,
        lr: float = 0.05,
        *,
        dropout: float = 0.2,
        optimizer: str = "sgd",
        schedule: str = "",
        noisy: float = 0.0,
    ) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout), nn.Tanh()),
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
            nn.Sequential(nn.Dropout(dropout), nn.LayerNorm(WIDTH)),
        )
        self.head = nn.Linear(WIDTH, 2)
        self.metric = MeanMetric()
        self.lr, self.optimizer, self.schedule, self.noisy = lr, optimizer, schedule, noisy
        self.losses: list[float] = []
        self.started, self.drawn = 0, torch.zeros(1, WIDTH)

    def prepare(self, x: Tensor) -> Tensor:
        self.drawn = torch.randn_like(x)
        return self.norm(self.embed(x + 0.01 * self.drawn * self.training))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.started += 1
        x, y = batch
        self.log("started", float(self.started), on_step=True)
        self.log("batches", 1.0, on_epoch=True, on_step=False, reduce_fx="sum")
        hidden = self.net(self.prepare(x))
        loss = (self.head(hidden) - y - self.noisy * self.drawn[:, :2]).square().mean()
        self.losses.append(float(loss.detach()))
        self.log("train", loss, on_step=True, on_epoch=True, sync_dist=True, prog_bar=True)
        return loss

    def _error(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.head(self.net(self.prepare(x))) - y).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self._error(batch)
        self.metric.update(loss, weight=len(batch[0]))
        self.log("metric", self.metric)
        self.log("val", loss, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self._error(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.net(self.prepare(batch[0])))  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        else:
            groups = [
                {"params": self.net.parameters()},
                {"params": [*self.embed.parameters(), *self.norm.parameters()]},
            ]
            groups.append({"params": self.head.parameters(), "lr": self.lr / 2})
            optimizer = torch.optim.SGD(groups, self.lr, momentum=0.9, weight_decay=0.01)
        if self.schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val"}}
        if self.schedule == "step":
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        return optimizer


def loader(batch_size: int = 8, *, n: int = 60, **options: Any) -> DataLoader[Any]:
    """60 samples in batches of 8: the last one has 4."""
    return DataLoader(TensorDataset(INPUTS[:n], TARGETS[:n]), batch_size=batch_size, **options)


def trainer(devices: int, **options: Any) -> L.Trainer:
    knobs = {"stages": "net", **options.pop("knobs", {})}
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
        "max_epochs": 2,
        "accelerator": "cpu",
        "strategy": options.pop("strategy", None) or DelayedPipelineStrategy(**knobs),
    }
    return L.Trainer(devices=devices, **{**quiet, **options})


def weights(module: L.LightningModule) -> list[float]:
    return [float(x) for value in module.state_dict().values() for x in value.flatten()]
