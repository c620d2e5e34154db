"""Lightning's own loop over a shared loader: the epochs end by themselves, and each one validates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_async.data.loader import samples_per_batch, shared_loader
from lightning_async.data.share import Share, make_share
from tests.data.epoch_bench import Clock, FakeBoard, at_once


class Shared(SingleDeviceStrategy):
    """One device whose training samples come from a share."""

    share: Share | None = None

    def process_dataloader(self, dataloader: object) -> object:
        if not self.lightning_module.trainer.training:  # type: ignore[union-attr]
            return dataloader
        desk = FakeBoard(Clock(), 1).desks()[0]
        self.share = make_share("claim", desk, batch=samples_per_batch(dataloader))
        return shared_loader(dataloader, self.share, drive=at_once)  # type: ignore[arg-type]


class Counting(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []
        self.validations = 0

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        self.seen[-1] += batch[0].long().tolist()
        return (self.weight * batch[0]).sum()

    def on_train_batch_end(self, *_: Any) -> None:
        self.trainer.strategy.share.completed()  # type: ignore[attr-defined]

    def validation_step(self, *_: Any) -> None:
        self.validations += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.")
def test_epochs_of_the_fit_loop(tmp_path: Any) -> None:
    module, strategy = Counting(), Shared(device=torch.device("cpu"))
    trainer = Trainer(
        strategy=strategy,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = TensorDataset(torch.arange(50.0))
    trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=50))
    assert [sorted(epoch) for epoch in module.seen] == [list(range(50))] * 3
    assert module.seen[0] != module.seen[1]
    assert module.validations == 3 + 1  # and the sanity check
    assert strategy.share is not None
    assert (strategy.share.epoch, strategy.share.outstanding) == (2, 0)
