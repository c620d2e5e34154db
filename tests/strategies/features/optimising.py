"""Scenes: what a step is: optimizers, accumulation, clipping, precision, schedules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from tests.strategies.features.fits import STEPS, Fitted, alike, fit, heard, whole
from tests.strategies.features.table import Scene, Verdict, differs, refused, shown, untried, works
from tests.strategies.lit import Lit

SECTION = "Optimizers, schedules, precision"


def _grad(trainer: L.Trainer, module: L.LightningModule) -> tuple[float, float]:
    """Norm and largest element of the gradient that the last step took."""
    flat = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    return float(flat.norm()), float(flat.abs().max())


def gradients(folder: Path) -> dict[str, Any]:
    return {
        "accumulate": fit(accumulate_grad_batches=3),
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
            lambda a, b: alike(a["hand"], b["hand"]) and whole(a["hand"], b["hand"], 1),
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


class Scheduled(Lit):
    """One optimizer and one of many schedules."""

    def __init__(self, make: Any, **config: Any) -> None:
        super().__init__()
        self.make, self.config = make, config

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
        return Fitted(fit(module), total=module.total)

    return {
        "epoch": run(lambda o, n: StepLR(o, 1, 0.1)),
        "step": run(lambda o, n: StepLR(o, 1, 0.9), interval="step", frequency=4),
        "cycle": run(_cycle, interval="step"),
        "warm-up": run(_warm_up, interval="step"),
        "plateau": run(lambda o, n: ReduceLROnPlateau(o, patience=0, threshold=1e9), monitor="val"),
        "by step": heard(lambda: run(lambda o, n: ReduceLROnPlateau(o), interval="step", monitor="train")),
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
        refused(
            "lr_scheduler",
            "`ReduceLROnPlateau` by step",
            "ReduceLROnPlateau with interval='step' goes by a metric that each rank sees differently between meetings, "
            "and the ranks' learning rates would differ; use interval='epoch'",
            key="by step",
        ),
        works(
            "estimated_stepping_batches",
            "",
            lambda a, b: a["cycle"].total == b["cycle"].total == 2 * STEPS,
            "steps of the run",
        ),
    ],
    warnings=["Detected call of `lr_scheduler.step", "The epoch parameter in `scheduler.step"],
)


PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-true")
ALIASES = {64: "64-true", "bf16": "bf16-mixed", 32: "32-true"}


def precisions(folder: Path) -> dict[str, Any]:
    def of(precision: Any) -> Fitted:
        dtypes: set[str] = set()

        def look(trainer: L.Trainer, module: L.LightningModule) -> str:
            dtypes.update(str(p.dtype) for p in module.parameters())
            return str(trainer.precision)

        return Fitted(fit(look=look, precision=precision, max_epochs=1), dtypes=dtypes)

    return {str(precision): of(precision) for precision in (*PRECISIONS, *ALIASES, "16-mixed")}


HALF = "exchanged and averaged in float32; the weights hold the rounding of that, which costs 4 bytes a parameter"
DTYPES = {"64-true": "torch.float64", "bf16-true": "torch.bfloat16", "16-true": "torch.float16"}


def _precise(precision: str) -> Any:
    def holds(a: Any, b: Any) -> bool:
        one, other = a[precision], b[precision]
        dtype = DTYPES.get(precision, "torch.float32")
        return (
            alike(one, other)
            and one.dtypes == {dtype}
            and {*one.looked} == {precision}
            and all(w == w for w in one.weights)
        )

    return holds


PRECISION = Scene(
    SECTION,
    precisions,
    [
        *[
            (
                differs("precision", f'"{p}"', HALF, _precise(p))
                if p in ("bf16-true", "16-true")
                else works("precision", f'"{p}"', _precise(p))
            )
            for p in PRECISIONS
        ],
        *[
            works(
                "precision",
                repr(alias).replace("'", '"'),
                lambda a, b, k=str(alias), p=p: {*a[k].looked} == {p},
                f'is `"{p}"`',
            )
            for alias, p in ALIASES.items()
        ],
        works(
            "precision",
            '"16-mixed"',
            lambda a, b: {*a["16-mixed"].looked} == {"bf16-mixed"},
            'on a CPU Lightning takes `"bf16-mixed"` for it',
        ),
        shown(
            "precision",
            '"16-mixed" with a scaler',
            Verdict.DIFFERS,
            "each rank has its own scale; `strategy.skipped_steps` counts what it skipped",
            "strategies/test_precision.py::test_steps_that_the_scaler_skips_are_counted_and_harm_nobody",
        ),
        shown(
            "precision",
            '"transformer-engine"',
            Verdict.REFUSED,
            "`precision='transformer-engine'` combines its scales over all ranks at every step; use "
            "`precision='bf16-true'`, or 'bf16-mixed'",
            "strategies/test_refusals.py::test_precision_that_exchanges_scales",
        ),
    ],
    warnings=[
        "You passed `Trainer\\(accelerator='cpu', precision='16-mixed'\\)`",
        "`precision=.*` is supported for historical",
        "16 is supported",
        ".*historical reasons.*",
    ],
)


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

SCENES = [GRADIENTS, HOOKS, SCHEDULES, PRECISION, REFUSALS]
ELSEWHERE = [
    untried("accelerator", '"gpu", "tpu", "hpu", "mps"', "nothing but CPUs was there"),
]
