"""An ordinary Lightning script, with one argument changed: `strategy="gossip_ring"`.

    python examples/gossip_ring.py                      two processes on this machine, half a minute
    python examples/gossip_ring.py --strategy ddp       the same script, synchronous
    python examples/gossip_ring.py --devices 4 --epochs 20
    torchrun --nnodes=2 --nproc-per-node=2 ... examples/gossip_ring.py --nodes 2 --devices 2        two nodes

The task is scikit-learn's handwritten digits: 1,797 images of 8x8 pixels, which come with the package.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_async  # noqa: F401  # registers the names of the strategies


class Digits(LightningModule):
    """A small network. Nothing in it knows how it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Loss and accuracy. `sync_dist` averages them over the ranks, as with ddp."""
        images, labels = batch
        logits = self.net(images)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), sync_dist=True, prog_bar=True)
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The learning rate is ddp's."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Train and say how good it has become."""
    parser = argparse.ArgumentParser(description="Digits on several processes.")
    parser.add_argument("--strategy", default="gossip_ring", help="gossip_ring, ddp, ... (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=2, help="processes on this machine (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=1, help="machines, under torchrun (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data (default: %(default)s)")
    arguments = parser.parse_args()

    seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.from_numpy(images).float() / 16 - 0.5, torch.from_numpy(labels).long())
    train, validation = random_split(data, [1397, 400])

    trainer = Trainer(
        strategy=arguments.strategy,  # the one argument
        accelerator="cpu",
        devices=arguments.devices,
        num_nodes=arguments.nodes,
        max_epochs=arguments.epochs,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Digits(), DataLoader(train, batch_size=16, shuffle=True), DataLoader(validation, batch_size=100))
    if trainer.is_global_zero:
        loss, accuracy = (float(trainer.callback_metrics[name]) for name in ("val_loss", "val_accuracy"))
        print(f"validation loss {loss:.3f}, accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
