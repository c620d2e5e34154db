"""Seeds of `accuracy` on real processes: the same samples, weights and learning rate, through the Trainer.

    limit     `ddp`, whose first seed is also run on processes: it takes the same batches there, so the two
              differ by what rounding grows to
    control   mode="none": replicas that never talk, averaged once at the end; the first seed alone
    virtual   the same seeds on the virtual cluster, whose order of messages is another one: near, not equal

One meeting, at the end of the one epoch: all samples of all passes are one stream in the seed's order, which ranks
claim in chunks. A step is as long on each fast rank, and 4x as long on the last.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks.accuracy import LOSS_MARGIN, POINTS_MARGIN, Compared, Run, asynchronous, ddp, factors
from benchmarks.launch import Ranks
from benchmarks.subject import GOSSIP, NONE, Knobs, made
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.tasks import Score, Task, characters, digits
from lightning_async import SpeedFaults

N = 4
SLOW = 4.0
SEEDS = 6
LIMIT = 600.0  # seconds that a run may take
VARIANTS: Mapping[str, Knobs | None] = {"ddp": None, GOSSIP: {}, "none": NONE}
ROLES = {"ddp": Role.LIMIT, "none": Role.CONTROL}
TASKS: Mapping[str, tuple[Callable[[], Task], float]] = {"digits": (digits, 0.01), "characters": (characters, 0.04)}
"""Each with the emulated seconds of a fast step: more than its compute, on few cores too."""


def run(quick: bool, seeds: int = SEEDS) -> Table:
    """`gossip_ring` with all seeds on processes, the others with the first, and beside each the same in one process."""
    rows: list[Row] = []
    claims: list[Claim] = []
    notes: list[str] = []
    every = range(1 if quick else seeds)
    for name in ["digits"] if quick else TASKS:
        task = TASKS[name][0]()
        found = {
            variant: [_on_processes(name, knobs, seed) for seed in (every if variant == GOSSIP else every[:1])]
            for variant, knobs in VARIANTS.items()
        }
        virtual = {variant: [_in_one(task, knobs, seed) for seed in every] for variant, knobs in VARIANTS.items()}
        for variant, runs in found.items():
            rows.append(Row(f"{name}: {variant}", ROLES.get(variant, Role.RESULT), _cells(runs, virtual, variant)))
        claims += _claims(name, found, virtual["ddp"])
        notes += [_each(name, seed, *pair) for seed, *pair in zip(every, found[GOSSIP], virtual["ddp"], strict=True)]
    notes += [
        f"gossip_ring: {len(every)} seeds, the others on processes: the first. Virtual: the mean of the same seeds.",
        "loss %, points: paired difference to `ddp` of the same seeds, with bootstrap 95 % intervals.",
    ]
    return Table(f"Seeds on {N} processes, one {SLOW:g}x slow, equal samples", rows, claims, notes)


def _cells(runs: Sequence[Run], virtual: Mapping[str, Sequence[Run]], variant: str) -> dict[str, Cell]:
    count = len(runs)
    compared = Compared.of(runs, virtual["ddp"][:count])
    return {
        "loss": fmean(one.score.loss for one in runs),
        "loss, virtual": fmean(one.score.loss for one in virtual[variant][:count]),
        "accuracy %": 100 * fmean(one.score.accuracy for one in runs),
        "accuracy %, virtual": 100 * fmean(one.score.accuracy for one in virtual[variant][:count]),
        "loss %": str(compared.loss),
        "points": str(compared.points),
        "seeds": count,
    }


def _each(name: str, seed: int, mine: Run, theirs: Run) -> str:
    ours, limit = mine.score, theirs.score
    accuracy = f"accuracy {100 * ours.accuracy:.2f} % (ddp {100 * limit.accuracy:.2f} %)"
    return f"{name}, seed {seed}: loss {ours.loss:.4f} (ddp {limit.loss:.4f}), {accuracy}"


def _claims(name: str, found: Mapping[str, Sequence[Run]], theirs: Sequence[Run]) -> list[Claim]:
    mine, control = found[GOSSIP], found["none"][0].score
    compared = Compared.of(mine, theirs)
    near = compared.points.mean >= -POINTS_MARGIN if name == "digits" else compared.loss.mean <= LOSS_MARGIN
    margin = f"0.5 points of ddp: {compared.points}" if name == "digits" else f"1 % of ddp's loss: {compared.loss} %"
    return [
        Claim(f"{name}: gossip_ring on average within {margin}", near),
        Claim(f"{name}: gossip_ring has a lower loss than the control", mine[0].score.loss < control.loss),
    ]


def _in_one(task: Task, knobs: Knobs | None, seed: int) -> Run:
    torch.set_num_threads(1)
    return ddp(task, seed, N) if knobs is None else asynchronous(task, seed, knobs, factors(N, SLOW))


# -- on processes -----------------------------------------------------------------------------------------------------


def _on_processes(name: str, knobs: Knobs | None, seed: int) -> Run:
    print(f"  {name}: {knobs}, seed {seed}", file=sys.stderr, flush=True)
    with Ranks(train, N, arguments={"name": name, "knobs": knobs, "seed": seed}) as ranks:
        scores = [Score(**value) for value in ranks.values(timeout=LIMIT)]
    if len(set(scores)) > 1:
        raise RuntimeError(f"the ranks ended unequal: {scores}")
    return Run(scores[0])


def train(name: str, knobs: dict[str, Any] | None, seed: int) -> dict[str, float]:
    """One rank: its consensus' score."""
    make, step = TASKS[name]
    module = Module(make(), seed)
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy="ddp" if knobs is None else made(knobs),
        max_epochs=1,
        callbacks=[SpeedFaults(step_seconds=step, slow={N - 1: SLOW})],
        limit_val_batches=0,
        use_distributed_sampler=knobs is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    order = torch.cat(module.task.batches(seed, N))
    data = TensorDataset(order)
    # Lightning's own would shuffle
    sampler: Any = DistributedSampler(data, N, int(os.environ["RANK"]), shuffle=False) if knobs is None else None
    trainer.fit(module, DataLoader(data, module.task.batch, sampler=sampler))
    return asdict(module.task.score(module.model))


class Module(LightningModule):
    """A task for the Trainer."""

    def __init__(self, task: Task, seed: int) -> None:
        super().__init__()
        self.task, self.model = task, task.model(seed)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of these samples."""
        return self.task.loss(self.model, batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The task's own, with `ddp`'s learning rate."""
        return self.task.optimize(self.parameters(), self.task.lr)
