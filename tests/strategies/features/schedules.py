"""Scenes: learning rates that change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from tests.strategies.features.fits import STEPS, Fitted, alike, fit
from tests.strategies.features.table import Scene, differs, works
from tests.strategies.lit import Lit

SECTION = "Optimizers, schedules, precision"


class Scheduled(Lit):
    """One optimizer and one of many schedules."""

    def __init__(self, make: Any, **config: Any) -> None:
        super().__init__()
        self.make, self.config = make, config

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        sign = 1.0 if self.global_rank else -1.0  # the mean of both ranks stays
        self.log("own", 9.0 + sign * self.current_epoch, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        self.total = int(self.trainer.estimated_stepping_batches)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make(optimizer, self.total), **self.config},
        }


def _warm_up(optimizer: Any, total: int) -> Any:
    parts = [LinearLR(optimizer, 0.1, total_iters=4), CosineAnnealingLR(optimizer, total - 4)]
    return SequentialLR(optimizer, parts, milestones=[4])


def _cycle(optimizer: Any, total: int) -> Any:
    return OneCycleLR(optimizer, 0.01, total_steps=total)


def schedules(folder: Path) -> dict[str, Any]:
    def run(make: Any, **config: Any) -> Fitted:
        module = Scheduled(make, **config)
        seen = fit(module)
        return Fitted(seen, total=module.total, rate=module.trainer.optimizers[0].param_groups[0]["lr"])

    return {
        "epoch": run(lambda o, n: StepLR(o, 1, 0.1)),
        "step": run(lambda o, n: StepLR(o, 1, 0.9), interval="step", frequency=4),
        "cycle": run(_cycle, interval="step"),
        "warm-up": run(_warm_up, interval="step"),
        "plateau": run(lambda o, n: ReduceLROnPlateau(o, patience=0, threshold=1e9), monitor="val"),
        "unsynced": run(lambda o, n: ReduceLROnPlateau(o, patience=0), monitor="own"),
        "by step": run(
            lambda o, n: ReduceLROnPlateau(o, patience=0, threshold=1e9),
            interval="step",
            frequency=STEPS,
            monitor="val",
        ),
    }


BY_THE_RUN = "stepped by the run: after one batch none, one or several times; equal on all ranks at meetings"


def _last(a: Any, b: Any, key: str) -> set[float]:
    return {round(one[key].rates[-1], 9) for one in (a, b)}


def _twin(make: Any, steps: int = 2 * STEPS) -> set[float]:
    """Where one rank's schedule stands after so many steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.01)
    schedule = make(optimizer, 2 * STEPS)
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    return {round(optimizer.param_groups[0]["lr"], 9)}


SCHEDULES = Scene(
    SECTION,
    schedules,
    [
        works(
            "lr_scheduler",
            '`interval="epoch"`',
            lambda a, b: all(
                {round(rate, 6) for rate in one["epoch"].rates} == {0.01, 0.001, 0.0001} for one in (a, b)
            ),
        ),
        differs(
            "lr_scheduler",
            '`interval="step"`, `frequency=4`',
            BY_THE_RUN,
            lambda a, b: _last(a, b, "step") == _twin(lambda o, n: StepLR(o, 1, 0.9), 2 * STEPS // 4),
        ),
        differs(
            "lr_scheduler",
            "`OneCycleLR` by step",
            f"{BY_THE_RUN}; it ends where it should",
            lambda a, b: a["cycle"].total == 2 * STEPS and _last(a, b, "cycle") == _twin(_cycle),
        ),
        differs(
            "lr_scheduler",
            "warm-up, then cosine (`SequentialLR`) by step",
            BY_THE_RUN,
            lambda a, b: _last(a, b, "warm-up") == _twin(_warm_up) and a["warm-up"].rates[0] < 0.01,
        ),
        works(
            "lr_scheduler",
            "`ReduceLROnPlateau` by epoch",
            lambda a, b: alike(a["plateau"], b["plateau"]) and len({*a["plateau"].rates}) == 2,
        ),
        differs(
            "lr_scheduler",
            "`ReduceLROnPlateau` by epoch, by what is logged without `sync_dist`",
            "with the mean over the ranks that have it (`ddp`: learning rates may differ by rank)",
            lambda a, b: {round(one["unsynced"].rate, 9) for one in (a, b)} == {0.001},
        ),
        differs(
            "lr_scheduler",
            "`ReduceLROnPlateau` by step",
            "asked as a meeting ends, at most once a meeting, with the mean over the ranks",
            lambda a, b: alike(a["by step"], b["by step"]) and _last(a, b, "by step") == {0.001},
        ),
        works(
            "estimated_stepping_batches",
            "",
            lambda a, b: a["cycle"].total == b["cycle"].total == 2 * STEPS,
            "steps of the run, the same on all ranks; a run of epochs ends there",
        ),
    ],
    warnings=[
        "It is recommended to use .*sync_dist=True",
        "Detected call of `lr_scheduler.step",
        "The epoch parameter in `scheduler.step",
    ],
)


SCENES = [SCHEDULES]
