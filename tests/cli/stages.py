"""Modules and data of pipelines that are recorded and replayed, some of them spoiled in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.strategies.piped import INPUTS, TARGETS, Piped


class Noisy(Dataset[Any]):
    """Regression with noise that is drawn anew each time."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        return INPUTS[index] + 0.1 * torch.randn(INPUTS.shape[1]), TARGETS[index]


class Stages(Piped):
    """With data of its own, in an order that is drawn."""

    samples = 60

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noisy(self.samples), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noisy(20), batch_size=8)


class Adam(Stages):
    """Another optimizer."""

    def __init__(self) -> None:
        super().__init__(0.01, optimizer="adam")


class Scheduled(Stages):
    """A learning rate that goes by steps."""

    def __init__(self) -> None:
        super().__init__(schedule="step")


class Flipped(Stages):
    """One weight of the first stage is changed by a little before its tenth batch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        turns = self.trainer.strategy.turns  # type: ignore[attr-defined]
        if self.trainer.strategy.index == 0 and turns.batches == 9:  # type: ignore[attr-defined]
            with torch.no_grad():
                self.net[0][0].bias.add_(1e-3)


class Other(Stages):
    """Does not begin as the run did."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.head.bias.add_(1.0)


class Fewer(Stages):
    """Has other data."""

    samples = 40


class Worked(Stages):
    """Whose data workers draw."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noisy(self.samples), batch_size=8, shuffle=True, num_workers=2)


class Growing(Stages):
    """With more data in each epoch."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noisy(40 + 20 * self.trainer.current_epoch), batch_size=8, shuffle=True)


class Two(Stages):
    """On two loaders, of which the second begins again within an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (inputs, targets), (others, _) = batch
        return super().training_step((inputs + 0.1 * others[: len(inputs)].mean(0), targets), batch_idx)

    def train_dataloader(self) -> Any:
        return [DataLoader(Noisy(samples), batch_size=8, shuffle=True) for samples in (56, 40)]


class Counted(IterableDataset[Any]):
    """An endless stream: each iterator goes on where the one before ended."""

    at = 0

    def __iter__(self) -> Any:
        while True:
            row = self.at % 60
            self.at += 1
            yield INPUTS[row] + 0.1 * torch.randn(INPUTS.shape[1]), TARGETS[row]


class Rows(IterableDataset[Any]):
    """The same without numbers, with noise."""

    def __iter__(self) -> Any:
        for inputs, target in zip(INPUTS[:60], TARGETS[:60], strict=True):
            yield inputs + 0.1 * torch.randn(INPUTS.shape[1]), target


class Streamed(Stages):
    """On a stream."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Rows(), batch_size=8)


class Endless(Stages):
    """On a stream without an end."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Counted(), batch_size=8)


def rows() -> DataLoader[Any]:
    return DataLoader(Rows(), batch_size=8)


def counted() -> DataLoader[Any]:
    return DataLoader(Counted(), batch_size=8)
