"""Scenes: optimizers, and what a module may not do between meetings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.strategies.features.fits import alike, fit, heard
from tests.strategies.features.table import Scene, differs, refused, works
from tests.strategies.lit import Lit

SECTION = "Optimizers, schedules, precision"


class With(Lit):
    """Another optimizer, or another layer."""

    def __init__(self, make: Any = None, layer: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.make = make
        if layer is not None:
            self.layer[1] = layer

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters()) if self.make else super().configure_optimizers()


class ZeroRedundancyOptimizer(torch.optim.SGD):
    """The real one needs a process group to be made at all; it is refused by its name."""


class Gathers(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.all_gather(batch[0])
        return super().training_step(batch, batch_idx)


class Nothing(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class GathersLater(Lit):
    """Gathers where all have met."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[int] = []

    def on_validation_epoch_end(self) -> None:
        self.gathered = self.all_gather(torch.tensor(self.global_rank)).tolist()


def refusals(folder: Path) -> dict[str, Any]:
    gathers = GathersLater()
    fit(gathers, max_epochs=1)
    return {
        "LBFGS": heard(lambda: fit(With(torch.optim.LBFGS))),
        "ZeRO": heard(lambda: fit(With(lambda p: ZeroRedundancyOptimizer(p, 0.1)))),
        "SyncBatchNorm": heard(lambda: fit(With(layer=torch.nn.SyncBatchNorm(8)))),
        "sync_batchnorm": heard(lambda: fit(sync_batchnorm=True)),
        "all_gather": heard(lambda: fit(Gathers())),
        "None": heard(lambda: fit(Nothing())),
        "gathered": gathers.gathered,
        **{kind.__name__: fit(With(lambda p, kind=kind: kind(p, 0.01)), max_epochs=1) for kind in USUAL},
    }


USUAL = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad)


REFUSALS = Scene(
    SECTION,
    refusals,
    [
        *[
            works("optimizer", f"`{kind.__name__}`", lambda a, b, k=kind.__name__: alike(a[k], b[k]))
            for kind in USUAL
            if kind.__name__ not in ("Adam", "AdamW")
        ],
        *[
            differs(
                "optimizer",
                f"`{name}`",
                "its steps are stretched to the length that `ddp` gives them ([why](gossip_ring.md#adam))",
                lambda a, b, k=name: alike(a[k], b[k]),
            )
            for name in ("Adam", "AdamW")
        ],
        refused(
            "optimizer",
            "`LBFGS`",
            "LBFGS evaluates the closure several times a step; use SGD, Adam or another optimizer that takes one step "
            "a batch",
            key="LBFGS",
        ),
        refused(
            "optimizer",
            "`ZeroRedundancyOptimizer`",
            "ZeroRedundancyOptimizer exchanges state between ranks at every step; pass the optimizer it wraps",
            key="ZeRO",
        ),
        refused(
            "sync_batchnorm",
            "True",
            "`sync_batchnorm=True` waits for all ranks in every forward pass; leave it out: BatchNorm's statistics are "
            "averaged at every meeting",
            key="sync_batchnorm",
        ),
        refused(
            "a layer",
            "`SyncBatchNorm`",
            "is a SyncBatchNorm, whose forward waits for all ranks; use BatchNorm (its statistics are averaged at "
            "every meeting) or GroupNorm",
            key="SyncBatchNorm",
        ),
        refused(
            "self.all_gather",
            "in `training_step`",
            "`all_gather` between meetings would wait for ranks that are at other steps; call it in validation or at "
            "the end of an epoch, or use `ddp`",
            key="all_gather",
        ),
        works("self.all_gather", "in validation", lambda a, b: a["gathered"] == b["gathered"] == [0, 1]),
        refused(
            "training_step",
            "returns None",
            "Skipping the `training_step` by returning None in distributed training is not supported",
            key="None",
        ),
    ],
)


SCENES = [REFUSALS]
