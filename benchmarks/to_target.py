"""How many steps each variant takes to a loss: a small network on the digits, 4 ranks here, no link in the way.

Bandwidth does not change what is computed, so steps are counted once and multiplied by the seconds of a step that a
link was measured with. Every variant has the same data, first weights and learning rate, that of `ddp`. The loss is
that of rank 0's weights on held-out samples behind every 8th step, where post-local SGD has just averaged (its first 7
steps are `ddp`'s); between two looks it is taken to be a straight line. The ranks' shares are alike, so `none`, which
never talks, gets there too, later: what averaging is worth on this task is the difference.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import functional as F  # noqa: N812

from benchmarks.launch import Ranks
from benchmarks.rivals import PERIOD, built
from benchmarks.tasks import digits
from benchmarks.work import Digits, Work, loaders

TARGET, LR, STEPS = 0.3, 0.02, 320
LIMIT = 600.0


class Looks(Callback):
    """The loss of this rank's weights, behind every so many steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Behind step 0."""
        self.losses = [self._loss(pl_module)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is over."""
        if (batch_idx + 1) % PERIOD == 0:
            self.losses.append(self._loss(pl_module))

    @staticmethod
    @torch.no_grad()
    def _loss(module: Any) -> float:
        x, y = digits().validation
        return F.cross_entropy(module.model(x), y).item()


def learn(variants: Sequence[str], steps: int) -> dict[str, list[float]]:
    """Train all variants on this rank, one after the other."""
    world = int(os.environ["WORLD_SIZE"])
    job, found = Work(world * steps, lr=LR, step=0.0), {}
    for variant in variants:
        looks = Looks()
        strategy, callbacks = built(variant, start=PERIOD - 1)
        torch.manual_seed(0)
        trainer = Trainer(
            accelerator="cpu",
            devices=world,
            strategy=strategy,
            max_epochs=1,
            limit_val_batches=0,
            callbacks=[looks, *callbacks],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
        )
        trainer.fit(Digits(job), loaders(job)[0])
        found[variant] = looks.losses
    return found


def steps_to_target(variants: Sequence[str], ranks: int) -> dict[str, float]:
    """Steps by variant; infinite where a variant does not get there in the steps that it has."""
    arguments = {"variants": list(variants), "steps": STEPS}
    with Ranks(learn, ranks, arguments=arguments) as running:
        curves: Mapping[str, Sequence[float]] = running.values(timeout=LIMIT)[0]
    return {variant: reached(losses, TARGET) for variant, losses in curves.items()}


def reached(losses: Sequence[float], target: float) -> float:
    """After how many steps a line through the looks comes to the target for the first time."""
    if losses and losses[0] <= target:
        return 0.0
    for k, (before, after) in enumerate(pairwise(losses)):
        if after <= target < before:
            return PERIOD * (k + (before - target) / (before - after))
    return float("inf")
