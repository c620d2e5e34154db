"""Global weights by turns: each process pushes what its steps have moved when it is its turn, and steps on meanwhile.

    python examples/cyclic_delay.py                     two processes on this machine, half a minute
    python examples/cyclic_delay.py --slow 4            the second one 4x slower: the first pushes more batches at once
    python examples/cyclic_delay.py --token strict      the ring is never left, and all wait for their turn's answer
    python examples/cyclic_delay.py --push gradient     gradients are pushed, and one optimizer steps for all

At the end it says how many samples were in a push: with that many more a fast process makes use of its time.
The task is scikit-learn's handwritten digits, as in gossip_ring.py.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_async import CyclicDelayStrategy, SpeedFaults

BATCH = 16


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
        """Loss and accuracy of the server's weights."""
        images, labels = batch
        logits = self.net(images)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), sync_dist=True, prog_bar=True)
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The learning rate is ddp's: what a batch moves counts one n-th."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Train, say how good it has become, and how much was in a push."""
    parser = argparse.ArgumentParser(description="Digits on several processes, which push by turns.")
    parser.add_argument("--token", default="skip", choices=["skip", "strict"])
    parser.add_argument("--push", default="delta", choices=["delta", "gradient"])
    parser.add_argument("--devices", type=int, default=2, help="processes on this machine (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data (default: %(default)s)")
    parser.add_argument("--slow", type=float, default=1.0, help="how much slower the last process is")
    parser.add_argument("--start-method", default="popen", help="popen, spawn or fork (default: %(default)s)")
    arguments = parser.parse_args()

    seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.from_numpy(images).float() / 16 - 0.5, torch.from_numpy(labels).long())
    train, validation = random_split(data, [1397, 400])
    strategy = CyclicDelayStrategy(token=arguments.token, push=arguments.push, start_method=arguments.start_method)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=arguments.devices,
        max_epochs=arguments.epochs,
        callbacks=[SpeedFaults(step_seconds=0.005, slow={arguments.devices - 1: arguments.slow})],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Digits(), DataLoader(train, batch_size=BATCH, shuffle=True), DataLoader(validation, batch_size=100))
    if trainer.is_global_zero:
        loss, accuracy = (float(trainer.callback_metrics[name]) for name in ("val_loss", "val_accuracy"))
        print(f"validation loss {loss:.3f}, accuracy {accuracy:.1%}")
        counts = Counter(round(arrival.samples / BATCH) for arrival in strategy.arrivals())
        print("batches in rank 0's pushes:", ", ".join(f"{count}: {n}x" for count, n in sorted(counts.items())))


if __name__ == "__main__":
    main()
