"""Lightning's own loops over a fed loader: an epoch goes on where a checkpoint left it, whenever that was written."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_async.data.share import Balance
from lightning_async.strategies.feeding import Feeding
from tests.data.epoch_bench import Clock, FakeBoard, at_once

N, BATCH = 50, 8


def office(world: int = 1) -> Any:
    desk: Any = FakeBoard(Clock(), 1).desks()[0]
    desk.world = world
    return SimpleNamespace(carrier=desk, drive=at_once, recording=SimpleNamespace(on=False))


class Fed(SingleDeviceStrategy):
    """One device whose training data go through a feeding."""

    def __init__(self, balance: Balance = "claim") -> None:
        super().__init__(device=torch.device("cpu"))
        self.feeding, self.office = Feeding(balance), office()

    def process_dataloader(self, dataloader: object) -> object:
        trainer = self.lightning_module.trainer  # type: ignore[union-attr]
        if not trainer.training:
            return dataloader
        return self.feeding.share_out(dataloader, self.office, lambda: trainer.current_epoch)

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        super().save_checkpoint({**checkpoint, "feeding": self.feeding.state_dict()}, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self.feeding.load_state_dict(checkpoint["feeding"])
        return checkpoint


class Lit(LightningModule):
    def __init__(self, *, estimates: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[int]]] = []
        self.validated: list[int] = []
        self.estimates = estimates

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        feeding = self.trainer.strategy.feeding  # type: ignore[attr-defined]
        self.seen.append((feeding.share.epoch, batch[0].long().tolist()))
        return (self.weight * batch[0]).sum()

    def validation_step(self, *_: Any) -> None:
        self.validated.append(self.trainer.current_epoch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.estimates:
            assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), 1e-3)


class Interruption(Exception):  # noqa: N818
    """The run is cut short."""


class Saves(Callback):
    """Tells the feeding of each batch, as a strategy does; saves in one hook, at one batch, and stops there."""

    def __init__(self, hook: str, path: Path, epoch: int = 1, batch: int | None = None) -> None:
        self.hook, self.path, self.epoch, self.batch = hook, path, epoch, batch

    def save(self, trainer: Any, hook: str, batch: int | None = None) -> None:
        if (
            hook == self.hook
            and batch == self.batch
            and trainer.current_epoch == self.epoch
            and not trainer.sanity_checking
        ):
            trainer.save_checkpoint(self.path)
            raise Interruption

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.strategy.feeding.completed(batch)
        self.save(trainer, "on_train_batch_end", batch_idx)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.save(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.save(trainer, "on_train_epoch_end")


def loader(batch: int = BATCH, n: int = N, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(float(n))), batch_size=batch, shuffle=True, **options)


def fit(
    lit: Lit, callback: Callback, path: Path | None = None, *, validate: bool = True, balance: Balance = "claim"
) -> Fed:
    strategy = Fed(balance)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(strategy=strategy, callbacks=[callback], max_epochs=3, limit_val_batches=float(validate), **quiet)
    held_out = DataLoader(TensorDataset(torch.arange(4.0)), batch_size=4)
    with suppress(Interruption):
        trainer.fit(lit, loader(), held_out, ckpt_path=path, weights_only=True)
    return strategy


WHERE = [("on_train_batch_end", 0), ("on_train_batch_end", 3), ("on_train_batch_end", 6), ("on_train_epoch_end", None)]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("balance", ["claim", "equal"])
@pytest.mark.parametrize("estimates", [False, True])
@pytest.mark.parametrize(
    ("hook", "batch", "validate"),
    [
        *((hook, batch, validate) for hook, batch in WHERE for validate in (True, False)),
        ("on_validation_end", None, True),
    ],
)
def test_every_sample_of_every_epoch_is_trained_on_once(
    hook: str, batch: int | None, validate: bool, estimates: bool, balance: Balance, tmp_path: Path
) -> None:
    first, second, path = Lit(estimates=estimates), Lit(estimates=estimates), tmp_path / "it.ckpt"
    fit(first, Saves(hook, path, batch=batch), validate=validate, balance=balance)
    fit(second, Saves("", path), path, validate=validate, balance=balance)
    seen = Counter((epoch, sample) for epoch, samples in [*first.seen, *second.seen] for sample in samples)
    assert seen == Counter((epoch, sample) for epoch in range(3) for sample in range(N))
