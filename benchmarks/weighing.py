"""What one step of each rank moves the consensus by, in a run of the Trainer; 1 is fair, whoever is slow.

Every step of rank r adds 1 to weight r of its own replica, so the consensus counts whose steps arrived.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.launch import Ranks
from benchmarks.subject import Knobs, made
from benchmarks.work import Work
from lightning_async import SpeedFaults


def step_weights(knobs: Knobs, work: Work, n: int, *, timeout: float) -> list[float]:
    """Of each of `n` ranks, over one epoch of this work."""
    one = replace(work, epochs=1, every=0.0)
    with Ranks(weigh, n, arguments=one.arguments(knobs)) as ranks:
        found = ranks.values(timeout=timeout)
    return [n * moved[rank] / steps for rank, (steps, moved) in enumerate(found)]


def weigh(work: dict[str, object], knobs: Knobs, folder: str | None = None) -> tuple[int, list[float]]:
    """Count on this rank; its steps, and the consensus."""
    job, module = Work.read(work), Counts(int(os.environ["WORLD_SIZE"]))
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=made(knobs),
        max_epochs=job.epochs,
        callbacks=[SpeedFaults(step_seconds=job.step, slow=dict(job.slow), sigma=job.sigma)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(job.batches * job.batch)), job.batch))
    return module.steps, module.counts.tolist()


class Counts(LightningModule):
    """Its weights count steps, one for each rank."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.counts, self.steps = nn.Parameter(torch.zeros(n)), 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """With this slope SGD adds 1."""
        self.steps += 1
        return -self.counts[self.global_rank]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A step is as long as the slope."""
        return torch.optim.SGD(self.parameters(), 1.0)
