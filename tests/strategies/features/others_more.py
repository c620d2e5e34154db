"""The other strategies, once more: what limits, clips, accumulates, averages, thaws and rounds, under their modes too.

Fits and lines as in `others`, with a column for each mode that steps in another way.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_async import AsyncGlobalStrategy, AsyncStrategy, CyclicDelayStrategy, LazySignStrategy
from lightning_async.strategies.batchnorm import KEPT
from tests.strategies import lit, piped
from tests.strategies.features.fits import Fitted, Watch, alike, held_out, maker, mean_of, samples, told
from tests.strategies.features.others import Cell, Line, differs, of_both, refused, table, tried, works
from tests.strategies.features.table import Verdict

WAYS = GLOBAL, SYNC, CYCLIC, GRADIENT, LAZY, PIPE = (
    "async_global",
    'async_global, mode="sync"',
    "cyclic_delay",
    'cyclic_delay, push="gradient"',
    "lazy_sign",
    "delayed_pipeline",
)
MAKE: dict[str, Callable[..., Any]] = {
    GLOBAL: AsyncGlobalStrategy,
    SYNC: lambda **knobs: AsyncGlobalStrategy(mode="sync", **knobs),
    CYCLIC: CyclicDelayStrategy,
    GRADIENT: lambda **knobs: CyclicDelayStrategy(push="gradient", **knobs),
    LAZY: LazySignStrategy,
}
CLIP, RATE = 0.05, 0.01
LEAST, LEAST_PIPED = 15, 10
"""Steps: in mid-epoch, of 12 and of 8."""


# -- the fits ----------------------------------------------------------------------------------------------------------


class Stops(L.Callback):
    """Rank 1 wants to stop after its first batch."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_rank == 1


class Meets(L.Callback):
    """How many samples of all were trained on where all met."""

    def __init__(self) -> None:
        self.at: list[int] = []

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        strategy: Any = trainer.strategy
        strategy.at_meetings("met", lambda stretch: None, lambda words: self.at.append(_samples(strategy)))


def _samples(strategy: Any) -> int:
    return int(strategy.clock.progress.agreed.samples)


def _met(one: Any) -> bool:
    """Behind 20, 40, 60 and 80 samples, by no more than each rank's batch of 4, and where all 96 are trained on."""
    *points, end = dict.fromkeys(one.met)
    return len(points) == 4 and all(0 <= at - 20 * k < 8 for k, at in enumerate(points, 1)) and end == 96


class Moved(L.Callback):
    """How far the consensus is from where it began."""

    def __init__(self) -> None:
        self.by = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.began = _flat(module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.by = float((_flat(module) - self.began).norm())


class Overflows(lit.Lit):
    """On rank 1 the gradients of two batches are not finite."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if os.environ["RANK"] == "1" and batch_idx in (1, 2) else loss


class Backbone(lit.Lit):
    """What is thawed later, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.layer = nn.Sequential(self.backbone, nn.Linear(8, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.01)


class PipedBackbone(piped.Piped):
    """What is thawed later is in both stages."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleList([self.net[0], self.net[2]])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.01)


class Adapted(lit.Lit):
    """A frozen layer with a small one beside it that is trained, tied to another."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.again = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False), nn.Linear(8, 2)
        self.again.weight = self.down.weight
        self.layer[0].requires_grad_(False)
        self.base = self.layer[0].weight.detach().clone()

    def kept(self) -> bool:
        return torch.equal(self.layer[0].weight, self.base) and self.again.weight is self.down.weight

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        _, x, y = batch
        hidden = self.layer[0](x) + self.up(self.down(x) + self.again(x))
        return (self.layer[2](self.layer[1](hidden)) - y).square().mean()  # type: ignore[no-any-return]


class PipedAdapted(piped.Piped):
    """A frozen layer in one stage, and two that share their weight in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1][0].weight = self.net[0][0].weight
        self.net[2].requires_grad_(False)
        self.base = self.net[2][0].weight.detach().clone()

    def kept(self) -> bool:
        return torch.equal(self.net[2][0].weight, self.base) and self.net[1][0].weight is self.net[0][0].weight


def fits(way: str, folder: Path) -> dict[str, Fitted]:
    """The same fits, under one strategy in one mode."""

    def fit(
        callbacks: Sequence[L.Callback] = (),
        kind: Callable[[], Any] | None = None,
        data: Any = None,
        knobs: dict[str, Any] | None = None,
        look: Callable[[L.Trainer, L.LightningModule], Any] | None = None,
        **options: Any,
    ) -> Fitted:
        return tried(lambda: _fit(way, callbacks, kind, data, knobs or {}, look, {"max_epochs": 1, **options}))

    meets, moved = Meets(), Moved()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    size = 4 if os.environ["RANK"] == "0" else 8
    return {
        "cut": fit(knobs={"saves": "cut"}),
        "min_steps": fit([Stops()], min_steps=LEAST_PIPED if way == PIPE else LEAST, max_epochs=9),
        "limit": fit(limit_train_batches=6),
        "part": fit(limit_train_batches=0.5),
        "half": fit(val_check_interval=0.5),
        "meet": Fitted(fit([meets], knobs={"meet_every": 20}), met=meets.at),
        "clipped": Fitted(fit([moved], look=_norm, gradient_clip_val=CLIP), moved=moved.by),
        "scheduled": fit([GradientAccumulationScheduler({1: 4})], max_epochs=2),
        "double": fit(look=_dtypes, precision="64-true"),
        "scaled": fit(kind=Overflows, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]),
        "swa": fit([StochasticWeightAveraging(0.005, swa_epoch_start=2)], max_epochs=3),
        "thawed": fit(
            [BackboneFinetuning(1)], kind=PipedBackbone if way == PIPE else Backbone, look=_trained, max_epochs=2
        ),
        "anew": fit(knobs={"buffers": "reestimate"}),
        "adapted": fit(kind=PipedAdapted if way == PIPE else Adapted, look=_places),
        "sizes": fit(data=piped.loader(size) if way == PIPE else samples(size)),
    }


def _fit(
    way: str, callbacks: Sequence[L.Callback], kind: Any, data: Any, knobs: dict[str, Any], look: Any, options: Any
) -> Fitted:
    watch = Watch(look)
    module = (kind or (piped.Piped if way == PIPE else lit.Lit))()
    options = {"callbacks": [*callbacks, watch], **options}
    if way == PIPE:
        one, loaders = piped.trainer(2, knobs=knobs, **options), (piped.loader(), piped.loader(20))
    else:
        one, loaders = maker(strategy=MAKE[way](**knobs), **options), (samples(), held_out())
    one.fit(module, loaders[0] if data is None else data, loaders[1])
    kept = getattr(module, "kept", lambda: False)()
    return Fitted(told(one, module, watch), skipped=getattr(one.strategy, "skipped_steps", 0), kept=kept)


def _norm(trainer: L.Trainer, module: L.LightningModule) -> float:
    found = [p.grad.norm() for p in module.parameters() if p.grad is not None]
    return float(torch.stack(found).norm()) if found else 0.0


def _dtypes(trainer: L.Trainer, module: L.LightningModule) -> str:
    return " ".join({str(p.dtype) for p in module.parameters() if p.numel()})


def _trained(trainer: L.Trainer, module: L.LightningModule) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _places(trainer: L.Trainer, module: L.LightningModule) -> int:
    """Of how many parameters the vector is made that travels."""
    strategy = trainer.strategy
    return len(strategy.replica.places) if isinstance(strategy, AsyncStrategy) else 0


def _flat(module: L.LightningModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# -- what must hold ----------------------------------------------------------------------------------------------------


def _line(of: str, value: str, everywhere: Cell, **cells: Cell) -> Line:
    """`free`: those between whose meetings all are free; `in_step`: those who step together; `pipe`."""
    kinds = dict.fromkeys((GLOBAL, CYCLIC, GRADIENT), "free") | dict.fromkeys((SYNC, LAZY), "in_step") | {PIPE: "pipe"}
    return Line(of, value, {way: cells.get(kind, everywhere) for way, kind in kinds.items()})


def _steps(n: int) -> Callable[[Any], bool]:
    return lambda one: bool(one.global_step == n)


def _finite(one: Any) -> bool:
    return all(map(math.isfinite, one.weights))


def _mean_of_epochs(one: Any) -> bool:
    """Of the weights as the second and the third began; the fourth trains nothing."""
    return one.epoch == 4 and mean_of(one, 1, 2)


def _anew(a: Any, b: Any) -> bool:
    """The statistics are of no more than the last batches; otherwise of all that a rank trained on."""
    of = {key: a[key].weights[-1] for key in ("anew", "clipped")}  # BatchNorm counts its batches
    return of_both("anew", _finite)(a, b) and of["anew"] == KEPT < 12 <= of["clipped"]


def _skipped(a: Any, b: Any) -> bool:
    """Rank 1 left out its second and third batch, as far as it had so many."""
    one, other = a["scaled"], b["scaled"]
    counted = (one.skipped, other.skipped) == (0, min(2, max(0, other.batches - 1)))
    return not one.said and not other.said and alike(one, other) and counted and _finite(one)


def _clipped(a: Any, b: Any) -> bool:
    """What all moved by is no more than 12 steps by clipped gradients; these are unclipped beyond the first step."""
    one, other = a["clipped"], b["clipped"]
    return not one.said and alike(one, other) and 0 < one.moved <= 12 * RATE * CLIP * (1 + 1e-4)


def _clipped_stage(a: Any, b: Any) -> bool:
    found = a["clipped"].looked
    return alike(a["clipped"], b["clipped"]) and all(abs(norm - CLIP) < 1e-4 * CLIP for norm in found)


def _no_knob(key: str, knob: str) -> Cell:
    return refused(key, f"`{knob}` is for strategies whose ranks meet, and not for a pipeline")


SHARED = "of the epoch of all, shared out by speed"
TOGETHER = "give all ranks one batch_size, or take a mode in which nobody waits"
LINES = [
    _line(
        "`min_steps`, and one rank stops early",
        "in the second epoch",
        works("min_steps", _steps(LEAST)),
        free=differs("min_steps", "steps of the run", _steps(LEAST)),
        pipe=differs("min_steps", "within the next batches", lambda one: LEAST_PIPED <= one.global_step < 16),
    ),
    _line(
        "`limit_train_batches`",
        "6",
        works("limit", _steps(6)),
        free=differs("limit", SHARED, lambda one: one.global_step == 6),
    ),
    _line(
        "`limit_train_batches`",
        "0.5",
        works("part", _steps(6)),
        free=differs("part", SHARED, _steps(6)),
        pipe=works("part", _steps(4)),
    ),
    _line(
        "`val_check_interval`",
        "0.5",
        works("half", lambda one: one.validated == [6, 12]),
        free=differs("half", "a part of the batches of all ranks", lambda one: one.validated == [6, 12]),
        pipe=works("half", lambda one: one.validated == [4, 8]),
    ),
    _line(
        "`meet_every` (of the strategy)",
        "20",
        works("meet", _met, "they meet, and average, in mid-epoch"),
        pipe=_no_knob("meet", "meet_every"),
    ),
    _line(
        "`saves` (of the strategy)",
        '`"cut"`',
        refused("cut", "Leave it out, and all meet for a checkpoint by steps"),
        pipe=_no_knob("cut", "saves"),
    ),
    _line(
        "`gradient_clip_val`",
        str(CLIP),
        Cell(Verdict.DIFFERS, "a rank's own gradient, before any exchange", _clipped),
        pipe=Cell(Verdict.DIFFERS, "that of a stage; `clip=` says otherwise", _clipped_stage),
    ),
    _line(
        "`GradientAccumulationScheduler`",
        "`{1: 4}`",
        works("scheduled", _steps(15)),
        free=differs("scheduled", "each rank its own batches", _steps(15)),
        pipe=works("scheduled", _steps(10)),
    ),
    _line("`precision`", '`"64-true"`', works("double", lambda one: {*one.looked} == {"torch.float64"})),
    _line(
        "`precision`",
        '`"16-mixed"` with a scaler',
        Cell(Verdict.DIFFERS, "each rank has its own scale; what it skips is counted", _skipped),
        pipe=refused("scaled", "use 'bf16-mixed'"),
    ),
    _line(
        "`StochasticWeightAveraging`",
        "",
        works("swa", _mean_of_epochs, "the method begins anew from the average"),
        pipe=works("swa", _mean_of_epochs, "each stage averages its own"),
    ),
    _line(
        "`BackboneFinetuning`",
        "",
        works("thawed", lambda one: {*one.looked} == {25, 97}),
        pipe=works("thawed", lambda one: {*one.looked} == {134, 218}, "each stage keeps its part of the new group"),
    ),
    _line(
        "`buffers` (of the strategy)",
        '`"reestimate"`',
        Cell(Verdict.WORKS, "", _anew),
        pipe=_no_knob("anew", "buffers"),
    ),
    _line(
        "frozen and tied parameters",
        "LoRA's kind",
        works("adapted", lambda one: one.kept and {*one.looked} == {7}, "only what is trained travels, once"),
        pipe=works("adapted", lambda one: one.kept, "if tied ones live in one stage"),
    ),
    _line(
        "`DataLoader`",
        "another `batch_size` on each rank",
        works("sizes", lambda one: one.global_step == 8, "each sample counts the same"),
        in_step=refused("sizes", TOGETHER),
        pipe=refused("sizes", "every rank must read the same batches"),
    ),
]
HEAD = "\nThe same in the modes that step in another way:\n\n"


def section() -> str:
    """This part of the page."""
    return HEAD + table(WAYS, LINES)
