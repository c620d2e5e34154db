"""An ordinary Lightning script with two lines added: what waiting costs, and who is slow, before anything is changed.

    python examples/watch.py                            ddp on three processes, one of them made slow: it says so
    python examples/watch.py --strategy gossip_ring     the same, asynchronous: delays, traffic, distance of replicas
    lightning-async report watch                        the run as one page (needs matplotlib)
    lightning-async audit watch --max-delay 100         did it keep its promises?

The slowness is pretended (`SpeedFaults`), so that there is something to see on one machine; leave it out on a cluster.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_async import AdaptiveShrink, DelayStats, SpeedFaults, SpreadStats, TrafficStats  # the first line


class Digits(LightningModule):
    """A small network for images of 8x8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The loss, averaged over the ranks."""
        images, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(images), labels), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Nothing special."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Train, and show the straggler."""
    parser = argparse.ArgumentParser(description="Two lines that tell what waiting costs.")
    parser.add_argument("--strategy", default="ddp", help="ddp, gossip_ring, ... (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=3, help="processes (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the data (default: %(default)s)")
    parser.add_argument("--out", default="watch", help="folder of the logs (default: %(default)s)")
    arguments = parser.parse_args()

    seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.from_numpy(images).float() / 16 - 0.5, torch.from_numpy(labels).long())
    slow = SpeedFaults(
        step_seconds=0.01,
        slow={arguments.devices - 1: 4.0},
        schedule={0: [(20, 3.0), (40, 1.0)]},
    )
    stats = [DelayStats(), TrafficStats(), SpreadStats(), AdaptiveShrink()]  # the second line

    trainer = Trainer(
        strategy=arguments.strategy,
        accelerator="cpu",
        devices=arguments.devices,
        max_epochs=arguments.epochs,
        callbacks=[slow, *stats],
        logger=CSVLogger(arguments.out, name="", version=""),
        enable_checkpointing=False,
    )
    trainer.fit(Digits(), DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=200))
    if trainer.is_global_zero:
        for group in stats:
            for name in group.shown:
                if name in group.figures:
                    print(f"{group.group}/{name:<16} {group.figures[name]:.4g}")
        print(f"lightning-async report {arguments.out}")


if __name__ == "__main__":
    main()
