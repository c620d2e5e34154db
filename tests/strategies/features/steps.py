"""Scenes: what a step is: accumulation, clipping, hooks, manual optimisation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.optim.lr_scheduler import (
    StepLR,
)

from tests.strategies.features.fits import Fitted, alike, fit, whole
from tests.strategies.features.table import Scene, differs, works
from tests.strategies.lit import Lit

SECTION = "Optimizers, schedules, precision"


def _grad(trainer: L.Trainer, module: L.LightningModule) -> tuple[float, float]:
    """Norm and largest element of the gradient that the last step took."""
    flat = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    return float(flat.norm()), float(flat.abs().max())


def gradients(folder: Path) -> dict[str, Any]:
    return {
        "accumulate": fit(accumulate_grad_batches=3, gradient_clip_val=0.5),
        "norm": fit(look=_grad, gradient_clip_val=0.1, max_epochs=1),
        "value": fit(look=_grad, gradient_clip_val=0.1, gradient_clip_algorithm="value", max_epochs=1),
        "not": fit(look=_grad, max_epochs=1),
    }


GRADIENTS = Scene(
    SECTION,
    gradients,
    [
        differs(
            "accumulate_grad_batches",
            "3",
            "each rank accumulates its own batches; a step of the run is 3 n batches",
            lambda a, b: (
                alike(a["accumulate"], b["accumulate"])
                and whole(a["accumulate"], b["accumulate"], 2)
                and 8 <= a["accumulate"].global_step <= 10
                and all(0 <= one["accumulate"].steps - one["accumulate"].batches / 3 <= 2 for one in (a, b))
            ),  # 48 batches by threes, and the rest of each rank's epoch
        ),
        differs(
            "gradient_clip_val",
            "0.1",
            "a rank's own gradient is clipped, before any exchange",
            lambda a, b: (
                alike(a["norm"], b["norm"])
                and all(norm <= 0.1001 for one in (a, b) for norm, _ in one["norm"].looked)
                and max(norm for norm, _ in a["not"].looked) > 0.2
            ),
        ),
        works(
            "gradient_clip_algorithm",
            '"norm"',
            lambda a, b: max(norm for norm, _ in a["norm"].looked) > 0.09,
            "the default",
        ),
        works(
            "gradient_clip_algorithm",
            '"value"',
            lambda a, b: (
                all(most <= 0.1001 for one in (a, b) for _, most in one["value"].looked)
                and max(norm for norm, _ in a["value"].looked) > 0.15
            ),
        ),
    ],
)


class ByHand(Lit):
    """Manual optimisation with two optimizers, as a GAN has."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.taken = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        index, x, y = batch
        self.seen += index.tolist()
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = (self.layer(x) - y).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.taken += 1
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        one = torch.optim.SGD(self.layer[0].parameters(), 0.01)
        two = torch.optim.Adam(self.layer[2].parameters(), 0.01)
        return [one, two], [StepLR(one, 1, 0.99), StepLR(two, 1, 0.99)]


class Hooks(Lit):
    """Every hook around a step, overridden as the documentation shows it; the loss comes in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "more": 1}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.called.append("optimizer_step")
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.called.append("optimizer_zero_grad")
        optimizer.zero_grad(set_to_none=False)

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        self.called.append("backward")
        loss.backward()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.called.append("configure_gradient_clipping")
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


def hooks(folder: Path) -> dict[str, Any]:
    by_hand, overridden = ByHand(), Hooks()
    first = fit(by_hand, max_epochs=1)
    return {
        "hand": Fitted(first, taken=by_hand.taken),
        "hooks": Fitted(fit(overridden, look=_grad, max_epochs=1), called=sorted({*overridden.called})),
    }


HOOKS = Scene(
    SECTION,
    hooks,
    [
        works(
            "automatic_optimization = False",
            "two optimizers, `toggle_optimizer`, `clip_gradients`",
            lambda a, b: (
                alike(a["hand"], b["hand"])
                and whole(a["hand"], b["hand"], 1)
                and all(one["hand"].steps == one["hand"].batches for one in (a, b))
            ),
            "a batch is one step of the method, however many optimizers step in it",
        ),
        works(
            "global_step",
            "with several optimizers",
            lambda a, b: a["hand"].global_step == (a["hand"].taken + b["hand"].taken) // 2,
            "counts the steps of each optimizer",
        ),
        differs(
            "self.lr_schedulers()",
            "stepped by hand",
            "go by the steps of the rank: the ranks' learning rates differ between meetings and after them",
            lambda a, b: all(math.isclose(one["hand"].rates[-1], 0.01 * 0.99 ** one["hand"].batches) for one in (a, b)),
        ),
        works(
            "optimizer_step, optimizer_zero_grad, backward, configure_gradient_clipping",
            "overridden",
            lambda a, b: (
                alike(a["hooks"], b["hooks"])
                and len(a["hooks"].called) == 4
                and all(norm <= 0.1001 for norm, _ in a["hooks"].looked)
            ),
        ),
        works("training_step", "returns a dictionary", lambda a, b: whole(a["hooks"], b["hooks"], 1)),
    ],
)


SCENES = [GRADIENTS, HOOKS]
