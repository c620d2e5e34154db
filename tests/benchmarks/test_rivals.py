"""What stands beside the signs does on CPUs what its name says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.rivals import PERIOD, PostLocalSGD, built
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import run

START = 3


class Weights(Callback):
    """The first weights behind every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(next(pl_module.parameters())[0, 0].item())


def fit(variant: str | None) -> list[float]:
    weights = Weights()
    strategy, callbacks = (PostLocalSGD(START), []) if variant is None else built(variant, START)
    torch.manual_seed(0)
    steps = START + PERIOD + 1
    run_of_both = trainer(2, strategy=strategy, max_steps=steps, callbacks=[weights, *callbacks], limit_val_batches=0)
    run_of_both.fit(Lit(), loader(), loader(shuffle=False))
    return weights.seen


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch's own
def test_post_local_sgd_talks_at_first_and_then_behind_every_eighth_step() -> None:
    first, second = run(2, fit, None, timeout=30)
    equal = [a == pytest.approx(b, abs=1e-7) for a, b in zip(first, second, strict=True)]
    assert equal == [True] * (START + 1) + [False] * (PERIOD - 1) + [True]


def test_bfloat16_is_taken_without_nccl() -> None:
    first, second = run(2, fit, "ddp, bf16", timeout=30)
    assert first == second
    assert first != run(2, fit, "ddp", timeout=30)[0]
