"""Signs in the place of numbers: the traffic of a step beside `ddp`'s, on an ordinary Lightning script.

    python examples/lazy_sign.py                                two processes on this machine, half a minute
    python examples/lazy_sign.py --rule periodic --devices 3    a step in four is sent
    python examples/lazy_sign.py --compressor none              the same exchange with whole numbers

The task is scikit-learn's handwritten digits: 1,797 images of 8x8 pixels, which come with the package.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_async import LazySignStrategy


class Digits(LightningModule):
    """A small network. Nothing in it knows how it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy, averaged over the ranks."""
        images, labels = batch
        self.log("val_accuracy", (self.net(images).argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The learning rate is ddp's."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


class Tell(Callback):
    """Says at the end how good it has become and what a step has cost."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The links are still up, and know what went over them."""
        strategy, n = trainer.strategy, trainer.world_size
        if trainer.is_global_zero and isinstance(strategy, LazySignStrategy):
            counts = [count for kinds in strategy.traffic().values() for count in kinds.values()]
            a_step = sum(count.bytes_out for count in counts) / strategy.steps
            ring = 2 * (n - 1) / n * 4 * sum(p.numel() for p in pl_module.parameters())
            print(f"accuracy {float(trainer.callback_metrics['val_accuracy']):.1%}")
            print(f"rank 0 sent {a_step:,.0f} bytes a step, headers included; ddp's ring sends {ring:,.0f}", flush=True)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description="Digits on several processes, one bit a number.")
    parser.add_argument("--rule", default="always", help="always, accumulate, periodic, ... (default: %(default)s)")
    parser.add_argument("--compressor", default="sign", help="sign or none (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=2, help="processes on this machine (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data (default: %(default)s)")
    parser.add_argument("--start-method", default="popen", help="how they start (default: %(default)s)")
    arguments = parser.parse_args()

    seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.from_numpy(images).float() / 16 - 0.5, torch.from_numpy(labels).long())
    train, validation = random_split(data, [1397, 400])

    strategy = LazySignStrategy(
        rule=arguments.rule, compressor=arguments.compressor, max_skip=3, start_method=arguments.start_method
    )
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=arguments.devices,
        max_epochs=arguments.epochs,
        logger=False,
        enable_checkpointing=False,
        callbacks=[Tell()],
    )
    trainer.fit(Digits(), DataLoader(train, batch_size=16, shuffle=True), DataLoader(validation, batch_size=100))


if __name__ == "__main__":
    main()
