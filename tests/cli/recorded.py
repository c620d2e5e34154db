"""Modules and data of runs that are recorded and replayed, some of them spoiled in one place."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    WeightedRandomSampler,
    get_worker_info,
)

SAMPLES = 120
INPUTS = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS @ torch.arange(1.0, 9.0).reshape(8, 1)
POISONED = 37


class Data(Dataset[Any]):
    """Regression with noise that is drawn anew each time; targets may be spoiled."""

    def __init__(self, spoiled: dict[int, float] | None = None, samples: int = SAMPLES) -> None:
        self.spoiled, self.samples = spoiled or {}, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return INPUTS[index] + 0.1 * torch.randn(8), TARGETS[index] + self.spoiled.get(index, 0.0)


class Net(L.LightningModule):
    """A small network with dropout, and its data."""

    def __init__(self, lr: float = 0.01, width: int = 16) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, 1))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self.layer(batch[0]) - batch[1]).square().mean()
        self.log("train", loss, on_epoch=True, sync_dist=True)
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Counting(Net):
    """Its loss goes by the length of its loader."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batches = len(self.trainer.train_dataloader)  # type: ignore[arg-type]
        return super().training_step(batch, batch_idx) / batches


class Unlike(Counting):
    """Batches of another size on each rank."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Data(), batch_size=2 + 4 * self.global_rank, shuffle=True)


class Mixing(Net):
    """Its training step draws by numpy, and nobody else does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        part = float(np.random.beta(0.4, 0.4))
        return super().training_step([part * one + (1 - part) * one.flip(0) for one in batch], batch_idx)


class Plateau(Net):
    """BatchNorm, Adam, validation with random numbers, and a learning rate that goes by it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((self.norm(batch[0]), batch[1]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.layer(batch[0]).mean() + torch.rand(()), sync_dist=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Data(), batch_size=40)

    def configure_optimizers(self) -> Any:
        adam = torch.optim.Adam(self.parameters(), self.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, patience=0, factor=0.1)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": plateau, "monitor": "val"}}


class Epochs(Plateau):
    """A learning rate that goes by epochs."""

    def configure_optimizers(self) -> Any:
        adam = torch.optim.AdamW(self.parameters(), self.lr, betas=(0.8, 0.9))
        return [adam], [torch.optim.lr_scheduler.StepLR(adam, 1, 0.5)]


class Stepwise(Plateau):
    """Goes by the run's steps: its learning rate, its loss, and when it stops."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + self.global_step / 10)

    def configure_optimizers(self) -> Any:
        adam = torch.optim.Adam(self.parameters(), self.lr)
        cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 0.02, total_steps=100)
        return [adam], [{"scheduler": cycle, "interval": "step"}]


class Foreseen(Net):
    """A learning rate that ends where the Trainer foresees it."""

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(self.parameters(), self.lr)
        total = self.trainer.estimated_stepping_batches
        cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.02, total_steps=int(total))
        return [sgd], [{"scheduler": cycle, "interval": "step"}]


class Midway(Epochs):
    """The same on data that draw nothing: what was fetched ahead of a save is fetched again."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Still(), batch_size=4, shuffle=True)


class Split(Plateau):
    """Whose data set each rank splits by itself, as it would under `ddp`."""

    def train_dataloader(self) -> DataLoader[Any]:
        data = Data(samples=SAMPLES - 1)
        return DataLoader(data, batch_size=4, sampler=DistributedSampler(data))  # type: ignore[arg-type]


class Streamed(Plateau):
    """On a stream of its own."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Own(), batch_size=4)


class Worked(Plateau):
    """On data that workers make, and by the rank."""

    def __init__(self, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + dist.get_rank())

    def train_dataloader(self) -> DataLoader[Any]:
        options = {"num_workers": 2, "persistent_workers": self.persistent, "worker_init_fn": make_ready}
        return DataLoader(InWorkers(), batch_size=4, shuffle=True, **options)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Data(), batch_size=40)


class WorkedPersistently(Worked):
    """Whose workers stay."""

    def __init__(self) -> None:
        super().__init__(True)


class WorkedOwn(Streamed):
    """On a stream that workers draw from."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Own(), batch_size=4, num_workers=1)


class Endless(Plateau):
    """On a stream without an end."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Own(10**9), batch_size=4)


class Unlikely(Plateau):
    """On streams of unlike lengths, each of which says how long it is."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Sized(24 + 24 * dist.get_rank()), batch_size=4)


class Paired(Plateau):
    """On two streams, the shorter of which begins again and again."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        both = [torch.cat(parts) for parts in zip(*batch, strict=True)]
        return super().training_step(both, batch_idx)

    def train_dataloader(self) -> Any:
        return CombinedLoader([DataLoader(Own(20), batch_size=4), DataLoader(Own(48), batch_size=4)], "max_size_cycle")


class Manual(Net):
    """Two optimizers by hand, one of them in every third batch; some batches take no step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer, every in zip(self.optimizers(), (2, 3), strict=True):
            if batch_idx % every == 0:
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layer[0].parameters(), 0.003), torch.optim.Adam(self.layer[3].parameters(), 0.01)


class Silent(Manual):
    """Which gives no loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)


class Flipped(Net):
    """One weight is changed by a little behind step 4 of member 1."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_rank == 1 and self.trainer.strategy.steps == 4:
            with torch.no_grad():
                self.layer[3].bias.add_(1e-3)


class Other(Net):
    """Does not begin as the run did."""

    def __init__(self) -> None:
        torch.rand(1)
        super().__init__()


class Whole(L.LightningDataModule):
    """The same data as a datamodule."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


class Still(Data):
    """Without noise."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return INPUTS[index], TARGETS[index]


class InWorkers(Data):
    """Which is made ready in its workers, draws there, and goes by the rank."""

    scale: float | None = None

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        assert self.scale is not None
        inputs, target = super().__getitem__(index)
        return inputs * self.scale + dist.get_rank(), target + random.random()


def make_ready(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.scale = 1.0 + worker + torch.rand(()).item()


class Long(Still):
    """The same rows again and again."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return super().__getitem__(index % SAMPLES)


class Own(IterableDataset[Any]):
    """A rank's part of a stream, with noise; it knows where it stands."""

    def __init__(self, length: int = 48) -> None:
        self.length, self.at = length, 0

    def __iter__(self) -> Any:
        noise = 0.1 * torch.randn(8)
        while self.at < self.length:
            self.at += 1
            row = (self.at * dist.get_world_size() + dist.get_rank()) % SAMPLES
            yield INPUTS[row] + noise * torch.randn(8), TARGETS[row]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Sized(Own):
    """One that says how long it is."""

    def __len__(self) -> int:
        return self.length


class Stream(IterableDataset[Any]):
    """Samples without numbers, the same on each rank."""

    def __init__(self, length: int = 20) -> None:
        self.length = length

    def __iter__(self) -> Any:
        return iter(list(zip(INPUTS, TARGETS, strict=True))[: self.length])


def loader(spoiled: dict[int, float] | None = None, samples: int = SAMPLES) -> DataLoader[Any]:
    return DataLoader(Data(spoiled, samples), batch_size=4, shuffle=True)


def poisoned() -> DataLoader[Any]:
    return loader({POISONED: 300.0})


def fewer() -> DataLoader[Any]:
    return loader(samples=100)


def incomplete() -> DataLoader[Any]:
    """Neither the ranks nor their batches come out even, and what is left is dropped."""
    return DataLoader(Data(), batch_size=7, shuffle=True, drop_last=True)


def uneven() -> DataLoader[Any]:
    return loader(samples=SAMPLES - 1)


def drawn_again() -> DataLoader[Any]:
    """A sampler of the user's own, which gives some samples often and others never."""
    odds = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(1))
    return DataLoader(Data(), batch_size=4, sampler=WeightedRandomSampler(odds, 90))  # type: ignore[arg-type]


def own_batches() -> DataLoader[Any]:
    return DataLoader(Data(), batch_sampler=[list(range(at, at + 4)) for at in range(0, SAMPLES, 4)])  # type: ignore[arg-type]


def stream() -> DataLoader[Any]:
    return DataLoader(Stream(), batch_size=4)


def shorter() -> DataLoader[Any]:
    return DataLoader(Stream(12), batch_size=4)


def by_worker() -> DataLoader[Any]:
    return DataLoader(Stream(), batch_size=4, num_workers=1)


def long() -> DataLoader[Any]:
    return DataLoader(Long(samples=3 * SAMPLES), batch_size=4, shuffle=True)


def by_fives() -> DataLoader[Any]:
    """Batches that few members' ranks can share evenly, and a last one of less."""
    return DataLoader(Data(samples=SAMPLES - 1), batch_size=5, shuffle=True)
