"""A LightningCLI script: the strategy and the callbacks come from config files, nothing here knows of them.

    python examples/cli.py fit --config strategies/gossip_ring.yaml
    python examples/cli.py fit --config strategies/gossip_ring.yaml --config callbacks/speed_faults.yaml
    python examples/cli.py fit --config strategies/gossip_ring.yaml --trainer.strategy.init_args.mode=push_sum
    python examples/cli.py fit --trainer.strategy=gossip_ring --print_config

By default two processes on this machine's CPU train for five epochs; the command line can change that
(`--trainer.devices=4 --trainer.max_epochs=20 --model.lr=0.1`).
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_async  # noqa: F401  # registers the names of the strategies

DEFAULTS = {"accelerator": "cpu", "devices": 2, "max_epochs": 5, "logger": False, "enable_checkpointing": False}


class Spirals(LightningModule):
    """Tells two spirals apart.

    Args:
        lr: Learning rate of Adam.
        width: Units of each hidden layer.
    """

    def __init__(self, lr: float = 0.01, width: int = 32) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        points, labels = batch
        return nn.functional.binary_cross_entropy_with_logits(self.net(points), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy, averaged over the ranks."""
        points, labels = batch
        right = (self.net(points) > 0) == (labels > 0.5)
        self.log("val_accuracy", right.float().mean(), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The learning rate is ddp's."""
        return torch.optim.Adam(self.parameters(), self.lr)


class Points(LightningDataModule):
    """Points on two spirals, drawn from a seed.

    Args:
        samples: How many points to train on.
        batch_size: Points of one step of one rank.
    """

    def __init__(self, samples: int = 4096, batch_size: int = 32) -> None:
        super().__init__()
        self.samples, self.batch_size = samples, batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The strategy decides which rank trains on which of them."""
        return DataLoader(_spirals(self.samples, seed=0), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Other points."""
        return DataLoader(_spirals(512, seed=1), 128)


def _spirals(samples: int, seed: int) -> TensorDataset:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (samples, 1), generator=random).float()
    along = torch.rand(samples, 1, generator=random)
    angle = 6 * along + torch.pi * labels
    points = along * torch.cat([angle.cos(), angle.sin()], 1)
    return TensorDataset(points + 0.02 * torch.randn(points.shape, generator=random), labels)


if __name__ == "__main__":
    LightningCLI(Spirals, Points, trainer_defaults=DEFAULTS, save_config_callback=None, seed_everything_default=0)
