"""What a rank really holds in the midst of a run: every tensor's memory once, and the memory that links share.

Not counted: what was there before the fit, weights, gradients and optimizers, but for what these remember in float32 of
narrower weights: as much of it as goes beyond the weights' own precision. Shared memory is mapped at both of its ends,
so each has half of it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_async import DelayedPipelineStrategy, SpeedFaults
from lightning_async.strategies.account import Account
from lightning_async.transport.shared import Memory
from tests.strategies.lit import trainer

WIDTH = 1000
BATCHES = 10
BATCH = 2


class Wide(L.LightningModule):
    """Two million parameters."""

    def __init__(self, optimizer: Callable[..., Any] = torch.optim.SGD) -> None:
        super().__init__()
        across = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(2)]
        self.net = torch.nn.Sequential(torch.nn.Linear(8, WIDTH), *across, torch.nn.Linear(WIDTH, 1))
        self.optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=1e-4)


class Long(Wide):
    """As many in three blocks, for three stages."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()) for _ in range(3)]
        self.first, self.net = torch.nn.Linear(8, WIDTH), torch.nn.Sequential(*blocks)
        self.head = torch.nn.Linear(WIDTH, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.net(self.first(batch[0]))).square().mean()  # type: ignore[no-any-return]


@dataclass
class Weighed:
    """What one rank holds and has sent, and what it said of both before."""

    held: int
    sent: dict[tuple[int, int], tuple[int, int]]
    said: Account
    line: str
    weights: int


class Scales(L.Callback):
    """Weighs the rank as the third epoch begins: two meetings are over."""

    def __init__(self) -> None:
        self.held = 0
        self.said, self.line = Account(), ""
        self.sent: dict[tuple[int, int], tuple[int, int]] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.line = trainer.strategy._first_line()
        self.said = self.account(trainer.strategy)

    def is_time(self, trainer: L.Trainer) -> bool:
        """Whether this batch is the one."""
        return trainer.current_epoch >= 2

    def account(self, strategy: Any) -> Account:
        """What it says of this rank, or of the one that holds the most."""
        if isinstance(strategy, DelayedPipelineStrategy):
            return strategy.accounts_of_stages(edge=BATCH * WIDTH * 4)[strategy.index]
        return strategy.account  # type: ignore[no-any-return]

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.held or not self.is_time(trainer):
            return
        ours = [t for p in module.parameters() for t in (p, p.grad) if t is not None]
        states = [(p, t) for o in trainer.optimizers for p, one in o.state.items() for t in one.values()]
        ours += [t for _, t in states if isinstance(t, Tensor)]
        wider = [(p, t) for p, t in states if isinstance(t, Tensor) and t.shape == p.shape]
        known = {t.untyped_storage().data_ptr() for t in ours}
        now = {at: t.untyped_storage().nbytes() for at, t in memory().items()}
        shared = sum(one._bytes.nbytes for one in gc.get_objects() if type(one) is Memory)
        self.held = sum(size for at, size in now.items() if at not in known) - shared // 2
        self.held += sum(t.numel() * (t.element_size() - p.element_size()) for p, t in wider)
        for peer, counts in trainer.strategy.traffic().items():
            for kind, count in counts.items():
                if count.messages_out:
                    self.sent[peer, kind] = (count.messages_out, count.bytes_out)


class HeldBack(TorchCheckpointIO):
    """Main files are written when `go` is set."""

    def __init__(self, folder: str) -> None:
        self.folder, self.there, self.go = folder, Event(), Event()

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if os.path.dirname(path) == self.folder:
            self.there.set()
            assert self.go.wait(30)
        super().save_checkpoint(checkpoint, path, storage_options)


class ScalesOfCuts(Scales):
    """Weighs the first rank when the main file of a cut is to be written."""

    def __init__(self, io: HeldBack) -> None:
        super().__init__()
        self.io = io

    def is_time(self, trainer: L.Trainer) -> bool:
        return self.io.there.is_set() and trainer.is_global_zero

    def on_train_batch_end(self, *batch: Any) -> None:
        super().on_train_batch_end(*batch)
        if self.held:
            self.io.go.set()


def memory() -> dict[int, Tensor]:
    """A tensor of each memory that there is, of those made since `weigh` began."""
    gc.collect()
    return {o.untyped_storage().data_ptr(): o for o in gc.get_objects() if type(o) is Tensor and o.numel()}


def weigh(
    make: Callable[[], Any],
    optimizer: Callable[..., Any] = torch.optim.SGD,
    precision: Any = "32-true",
    folder: str = "",
) -> Weighed:
    """One rank's part of a short fit; with a folder its checkpoints lie there."""
    gc.freeze()  # what the parent had is not looked at; and a strategy sets nothing aside where somebody has
    members, scales, strategy = int(os.environ["WORLD_SIZE"]), Scales(), make()
    module = Long() if isinstance(strategy, DelayedPipelineStrategy) else Wide(optimizer)
    more: dict[str, Any] = {"callbacks": [scales]}
    if folder:
        io = HeldBack(folder)
        scales = ScalesOfCuts(io)
        saves = ModelCheckpoint(folder, every_n_train_steps=4 * BATCHES)  # in the second epoch
        faults = SpeedFaults(step_seconds=0.02)
        more = {"callbacks": [scales, saves, faults], "plugins": [io], "enable_checkpointing": True}
    t = trainer(members, strategy=strategy, max_epochs=3, precision=precision, **more)
    data = TensorDataset(torch.randn(members * BATCHES * BATCH * (3 if folder else 1), 8))
    t.fit(module, DataLoader(data, batch_size=BATCH))
    return Weighed(scales.held, scales.sent, scales.said, scales.line, 4 * sum(p.numel() for p in module.parameters()))
