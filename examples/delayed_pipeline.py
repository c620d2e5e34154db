"""A network of 24 residual blocks over several processes; no layer waits for the backward pass of another.

    python examples/delayed_pipeline.py                      two processes on this machine, half a minute
    python examples/delayed_pipeline.py --devices 3 --shrink 0.5
    python examples/delayed_pipeline.py --devices 1          the same script, plain backpropagation

The training step is an ordinary one: what it does before `self.net` runs with the first layers, what it does behind it
with the last ones. At the end it draws who computed which batch when.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_async import DelayedPipelineStrategy
from lightning_async.pipeline.picture import draw


class Block(nn.Module):
    """Two layers beside a straight way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        return x + 0.1 * self.inner(x)  # type: ignore[no-any-return]


class Digits(LightningModule):
    """A deep network. Nothing in it knows that it will be cut."""

    def __init__(self, width: int = 128, blocks: int = 24) -> None:
        super().__init__()
        self.enter = nn.Linear(64, width)
        self.net = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.leave = nn.Linear(width, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.leave(self.net(self.enter(images))), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy."""
        images, labels = batch
        right = self.leave(self.net(self.enter(images))).argmax(1) == labels
        self.log("val_accuracy", right.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As ever: each process keeps what belongs to its layers."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


class Draw(Callback):
    """Draws how the run began, by rank 0."""

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """All stages have told what they did when."""
        if isinstance(strategy := trainer.strategy, DelayedPipelineStrategy) and trainer.is_global_zero:
            print("a digit: a batch going forward; its letter: on its way back")
            print(draw(strategy.timelines, first=11, last=20))


def main() -> None:
    """Train, and say how good it has become and who worked when."""
    parser = argparse.ArgumentParser(description="Digits through a delayed pipeline.")
    parser.add_argument("--devices", type=int, default=2, help="processes on this machine (default: %(default)s)")
    parser.add_argument("--shrink", type=float, default=1.0, help="factor on late gradients (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the data (default: %(default)s)")
    parser.add_argument("--start-method", default="popen", help="popen, fork or spawn (default: %(default)s)")
    arguments = parser.parse_args()

    seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.from_numpy(images).float() / 16 - 0.5, torch.from_numpy(labels).long())
    train, validation = random_split(data, [1397, 400])
    strategy = DelayedPipelineStrategy(stages="net", shrink=arguments.shrink, start_method=arguments.start_method)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=arguments.devices,
        max_epochs=arguments.epochs,
        callbacks=[Draw()],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Digits(), DataLoader(train, batch_size=32, shuffle=True), DataLoader(validation, batch_size=100))
    if trainer.is_global_zero:
        print(f"validation accuracy {float(trainer.callback_metrics['val_accuracy']):.1%}")


if __name__ == "__main__":
    main()
