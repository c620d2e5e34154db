"""How fast a pipeline is whose stages take 20 ms: the delayed one, its synchronous baseline, and torch's schedules.

    limit      the slowest stage alone, in the same Trainer loop: no pipeline can be faster
    control    all stages on one rank, one after the other
    baseline   `baseline="sync"`, 8 batches accumulated, drained after each update
    GPipe      torch.distributed.pipelining, m micro-batches of a batch, each of 1/m of a stage's time; 1F1B likewise

The work of a stage is emulated (it sleeps: a third of it forward, two thirds backward), so that four stages can be
measured on two cores; messages, stashing, copies of weights, hooks and optimizers are real. Equal stages take 20 ms
each; of unequal ones the second takes 20 ms and the others 12. All figures are batches per second over the limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.launch import Ranks
from benchmarks.repeat import Measures, repeat
from benchmarks.table import Claim, Role, Row, Table
from lightning_async import DelayedPipelineStrategy
from lightning_async.pipeline.picture import draw

STAGE, SHORT = 0.020, 0.012
SHARE = 0.95
WIDTH, BATCH = 64, 32
WARM = 12  # batches until the pipe is full and all is set up
ACCUMULATED = 8
LIMIT = 300.0
Seconds = Sequence[float]


class _Sleep(torch.autograd.Function):
    """Time that passes without a core: a third forward, two thirds backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds / 3)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(2 * ctx.seconds / 3)
        return gradients[0], None


class Slow(nn.Module):
    """One stage: a layer, and so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.layer, self.seconds = nn.Linear(WIDTH, WIDTH), seconds

    def forward(self, x: Tensor) -> Tensor:
        """The layer, slowly."""
        slept: Tensor = _Sleep.apply(torch.tanh(self.layer(x)), self.seconds)  # type: ignore[no-untyped-call]
        return slept


class Module(LightningModule):
    """Stages in a row."""

    def __init__(self, seconds: Seconds) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(Slow(s) for s in seconds))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Some loss."""
        (x,) = batch
        return self.net(x.requires_grad_()).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class _Clock(Callback):
    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """A batch is done here."""
        self.marks.append(time.monotonic())


def rate(marks: Sequence[float]) -> float:
    """Batches per second, once all is warm."""
    kept = marks[WARM:]
    return (len(kept) - 1) / (kept[-1] - kept[0])


def in_trainer(seconds: Seconds, batches: int, knobs: dict[str, Any] | None, accumulate: int) -> float:
    """Batches per second of a Trainer. `knobs` None: without a pipeline."""
    return rate(_fit(seconds, batches, knobs, accumulate)[0].marks)


def picture(seconds: Seconds, first: int, last: int) -> list[str]:
    """Who computes which of these batches when."""
    _, trainer = _fit(seconds, last + WARM, {}, 1)
    strategy = trainer.strategy
    return draw(strategy.timelines, first=first, last=last).splitlines()  # type: ignore[attr-defined]


def _fit(seconds: Seconds, batches: int, knobs: dict[str, Any] | None, accumulate: int) -> tuple[_Clock, Trainer]:
    clock = _Clock()
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy="auto" if knobs is None else DelayedPipelineStrategy(stages="net", **knobs),
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        callbacks=[clock],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(Module(seconds), DataLoader(TensorDataset(torch.randn(batches * BATCH, WIDTH)), BATCH))
    return clock, trainer


def in_torch(seconds: Seconds, batches: int, schedule: str, micro: int) -> float:
    """Batches per second of one of torch's schedules, with `micro` micro-batches of a batch."""
    from torch.distributed import pipelining

    dist.init_process_group("gloo")
    me, n = dist.get_rank(), len(seconds)
    torch.manual_seed(me)
    module = Slow(seconds[me] / micro)
    stage = pipelining.PipelineStage(module, me, n, torch.device("cpu"))
    make = getattr(pipelining, schedule)
    plan = make(stage, micro, loss_fn=lambda out, target: out.square().mean())
    optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)
    marks = []
    for _ in range(batches):
        x = torch.randn(BATCH, WIDTH, requires_grad=True)
        if me == 0:
            plan.step(x)
        elif me == n - 1:
            plan.step(target=torch.zeros(BATCH))
        else:
            plan.step()
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.monotonic())
    dist.barrier()
    dist.destroy_process_group()
    return rate(marks)


def _measure(function: Callable[..., float], ranks: int, **arguments: Any) -> Measures:
    with Ranks(function, ranks, arguments=arguments, env={"OMP_NUM_THREADS": "1"}) as running:
        return {"rate": running.values(timeout=LIMIT)[0]}


def run(quick: bool) -> Table:
    """Equal and unequal stages; two of them, and four."""
    batches, times = (72, 1) if quick else (200, 3)
    rows: list[Row] = []
    claims: list[Claim] = []
    for depth in (2,) if quick else (2, 4):
        for kind, seconds in (("equal", [STAGE] * depth), ("unequal", [SHORT, STAGE, SHORT, SHORT][:depth])):
            found, claim = _compare(f"K={depth} {kind}", seconds, batches, times)
            rows += found
            claims.append(claim)
    with Ranks(picture, 3, arguments={"seconds": [STAGE] * 3, "first": 1, "last": 10}) as running:
        notes = [
            "three equal stages; a digit: a batch going forward, its letter: on its way back",
            *running.values(timeout=LIMIT)[0],
        ]
    return Table("Pipelines: batches per second over those of the slowest stage alone", rows, claims, notes)


def _compare(name: str, seconds: Seconds, batches: int, times: int) -> tuple[list[Row], Claim]:
    n = len(seconds)
    alone = partial(_measure, in_trainer, 1, batches=batches, knobs=None, accumulate=1)
    piped = partial(_measure, in_trainer, n, seconds=seconds, batches=batches)
    variants = {
        "the slowest stage alone": partial(alone, seconds=[max(seconds)]),
        "all on one rank": partial(alone, seconds=seconds),
        "delayed_pipeline": partial(piped, knobs={}, accumulate=1),
        f"baseline='sync', {ACCUMULATED} accumulated": partial(
            piped, knobs={"baseline": "sync"}, accumulate=ACCUMULATED
        ),
    }
    for schedule in ("ScheduleGPipe", "Schedule1F1B"):
        for micro in (4, 8):
            variants[f"torch {schedule.removeprefix('Schedule')}, m={micro}"] = partial(
                _measure, in_torch, n, seconds=seconds, batches=batches, schedule=schedule, micro=micro
            )
    turns = repeat(variants, times)
    roles = {"the slowest stage alone": Role.LIMIT, "all on one rank": Role.CONTROL, "delayed_pipeline": Role.RESULT}
    rows = []
    for variant in variants:
        share = turns.ratio(variant, "the slowest stage alone", "rate")
        cells = {"share": share.median, "low": share.low, "high": share.high}
        rows.append(Row(f"{name}: {variant}", roles.get(variant, Role.OTHER), cells))
    share = turns.ratio("delayed_pipeline", "the slowest stage alone", "rate")
    return rows, Claim(f"{name}: at least {SHARE:.0%} of the slowest stage alone: {share}", share.median >= SHARE)
