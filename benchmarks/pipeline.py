"""How fast a pipeline is whose stages take 20 ms: the delayed one, its synchronous baseline, and torch's schedules.

    limit      the slowest stage alone, in the same Trainer loop: no pipeline can be faster
    control    all stages on one rank, one after the other
    baseline   `baseline="sync"`, 8 batches accumulated, drained after each update
    GPipe      torch.distributed.pipelining, m micro-batches of a batch, each of 1/m of a stage's time; 1F1B likewise,
               and its zero-bubble schedule, which puts gradients of weights where others wait

The work of a stage is emulated (it sleeps: a third of it forward, a third for each half of backward), so that four
stages can be measured on two cores; messages, stashing, copies of weights, hooks and optimizers are real. Equal stages
take 20 ms each; of unequal ones the second takes 20 ms and the others 12. All figures are batches per second over the
limit.
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
from benchmarks.repeat import Measures, Turns, repeat
from benchmarks.table import Claim, Role, Row, Table
from lightning_async import DelayedPipelineStrategy
from lightning_async.pipeline.picture import draw

STAGE, SHORT = 0.020, 0.012
SHARE = 0.95
WIDTH, BATCH = 64, 32
WARM = 12  # batches until the pipe is full and all is set up
ACCUMULATED = 8
LIMIT = 300.0
ALONE, CONTROL, RESULT = "the slowest stage alone", "all on one rank", "delayed_pipeline"
Seconds = Sequence[float]


class _Sleep(torch.autograd.Function):
    """Time that passes without a core: so much forward, and as much backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)  # the emulated compute
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(ctx.seconds)  # the emulated compute
        return gradients[0], None


class _SleepBack(torch.autograd.Function):
    """Time that passes on the way to a weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(ctx.seconds)  # the emulated compute
        return gradients[0], None


class Slow(nn.Module):
    """One stage: a layer, and so many seconds, a third each for forward, the gradient of x, and that of the weight."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.layer, self.seconds = nn.Linear(WIDTH, WIDTH), seconds

    def forward(self, x: Tensor) -> Tensor:
        """The layer, slowly."""
        weight = _SleepBack.apply(self.layer.weight, self.seconds / 3)  # type: ignore[no-untyped-call]
        out = torch.tanh(nn.functional.linear(x, weight, self.layer.bias))
        slept: Tensor = _Sleep.apply(out, self.seconds / 3)  # type: ignore[no-untyped-call]
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
    stages = [stage] if "ZeroBubble" in schedule else stage  # it is made for many stages a rank, and takes one
    plan = make(stages, micro, loss_fn=lambda out, target: out.square().mean())
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
    batches, times, others = (72, 2, 1) if quick else (200, 5, 3)
    rows: list[Row] = []
    claims: list[Claim] = []
    for depth in (2, 4):
        for kind, seconds in (("equal", [STAGE] * depth), ("unequal", [SHORT, STAGE, SHORT, SHORT][:depth])):
            name = f"K={depth} {kind}"
            found, claim = _against_the_limit(name, seconds, batches, times)
            rows += found + _others(
                name, seconds, batches, others, micros=(4, 8) if not quick else (8,) if kind == "equal" else ()
            )
            claims.append(claim)
    with Ranks(picture, 3, arguments={"seconds": [STAGE] * 3, "first": 1, "last": 10}) as running:
        notes = [
            "three equal stages; a digit: a batch going forward, its letter: on its way back",
            *running.values(timeout=LIMIT)[0],
        ]
    return Table("Pipelines: batches per second over those of the slowest stage alone", rows, claims, notes)


def _against_the_limit(name: str, seconds: Seconds, batches: int, times: int) -> tuple[list[Row], Claim]:
    piped = partial(_measure, in_trainer, len(seconds), seconds=seconds, batches=batches, knobs={}, accumulate=1)
    turns = repeat({ALONE: _alone([max(seconds)], batches), RESULT: piped}, times)
    rows = [_row(name, ALONE, Role.LIMIT, turns), _row(name, RESULT, Role.RESULT, turns)]
    share = turns.ratio(RESULT, ALONE, "rate")
    return rows, Claim(f"{name}: at least {SHARE:.0%} of the slowest stage alone: {share}", share.median >= SHARE)


def _others(name: str, seconds: Seconds, batches: int, times: int, *, micros: Sequence[int]) -> list[Row]:
    n = len(seconds)
    variants: dict[str, Callable[[], Measures]] = {
        ALONE: _alone([max(seconds)], batches),
        CONTROL: _alone(seconds, batches),
        f"baseline='sync', {ACCUMULATED} accumulated": partial(
            _measure,
            in_trainer,
            n,
            seconds=seconds,
            batches=batches,
            knobs={"baseline": "sync"},
            accumulate=ACCUMULATED,
        ),
    }
    for schedule in ("ScheduleGPipe", "Schedule1F1B", "ScheduleInterleavedZeroBubble"):
        for micro in micros:
            variants[f"torch {schedule.removeprefix('Schedule')}, m={micro}"] = partial(
                _measure, in_torch, n, seconds=seconds, batches=batches, schedule=schedule, micro=micro
            )
    turns = repeat(variants, times)
    return [_row(name, v, Role.CONTROL if v == CONTROL else Role.OTHER, turns) for v in variants if v != ALONE]


def _alone(seconds: Seconds, batches: int) -> Callable[[], Measures]:
    return partial(_measure, in_trainer, 1, seconds=seconds, batches=batches, knobs=None, accumulate=1)


def _row(name: str, variant: str, role: Role, turns: Turns) -> Row:
    share = turns.ratio(variant, ALONE, "rate")
    return Row(f"{name}: {variant}", role, {"share": share.median, "low": share.low, "high": share.high})
