"""One seed of `accuracy` on real processes: the same samples, weights and learning rate, through the Trainer.

    limit     `ddp` on processes, which takes the same batches as `ddp` in one process: the two rows must agree
    control   mode="none": replicas that never talk, averaged once at the end
    virtual   the same seed on the virtual cluster, whose order of messages is another one: near, not equal

One meeting, at the end of the one epoch: all samples of all passes are one stream in the seed's order, which ranks
claim in chunks. A step is as long on each fast rank, and 4x as long on the last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks.accuracy import asynchronous, ddp, factors
from benchmarks.launch import Ranks
from benchmarks.subject import NONE, Knobs, made
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.tasks import Score, Task, characters, digits
from lightning_async import SpeedFaults

N = 4
SLOW = 4.0
SEED = 0
LIMIT = 600.0  # seconds that a run may take
VARIANTS: Mapping[str, Knobs | None] = {"ddp": None, "gossip_ring": {}, "none": NONE}
ROLES = {"ddp": Role.LIMIT, "none": Role.CONTROL}
TASKS: Mapping[str, tuple[Callable[[], Task], float]] = {"digits": (digits, 0.01), "characters": (characters, 0.04)}
"""Each with the emulated seconds of a fast step: more than its compute, on few cores too."""


def run(quick: bool) -> Table:
    """Every variant on processes and, beside it, in one."""
    rows: list[Row] = []
    claims: list[Claim] = []
    for name in ["digits"] if quick else TASKS:
        task, found = TASKS[name][0](), {variant: _on_processes(name, knobs) for variant, knobs in VARIANTS.items()}
        for variant, score in found.items():
            virtual = _in_one(task, VARIANTS[variant])
            rows.append(
                Row(f"{name}: {variant}", ROLES.get(variant, Role.RESULT), _cells(score, virtual, found["ddp"]))
            )
        claims += _claims(name, found)
    notes = [f"seed {SEED}; loss %, points: against `ddp` on processes, of one seed: no interval"]
    return Table(f"One seed on {N} processes, one {SLOW:g}x slow, equal samples", rows, claims, notes)


def _cells(score: Score, virtual: Score, baseline: Score) -> dict[str, Cell]:
    return {
        "loss": score.loss,
        "accuracy %": 100 * score.accuracy,
        "loss, virtual": virtual.loss,
        "accuracy %, virtual": 100 * virtual.accuracy,
        "loss %": round(100 * (score.loss / baseline.loss - 1), 2),
        "points": round(100 * (score.accuracy - baseline.accuracy), 2),
    }


def _claims(name: str, found: Mapping[str, Score]) -> list[Claim]:
    mine, theirs, control = (found[variant] for variant in ("gossip_ring", "ddp", "none"))
    points, percent = 100 * (mine.accuracy - theirs.accuracy), 100 * (mine.loss / theirs.loss - 1)
    near = points >= -0.5 if name == "digits" else percent <= 1.0
    margin = f"0.5 points of ddp: {points:+.2f}" if name == "digits" else f"1 % of the loss of ddp: {percent:+.2f} %"
    return [
        Claim(f"{name}: gossip_ring within {margin}", near),
        Claim(f"{name}: gossip_ring has a lower loss than the control", mine.loss < control.loss),
    ]


def _in_one(task: Task, knobs: Knobs | None) -> Score:
    torch.set_num_threads(1)
    return ddp(task, SEED, N).score if knobs is None else asynchronous(task, SEED, knobs, factors(N, SLOW)).score


# -- on processes -----------------------------------------------------------------------------------------------------


def _on_processes(name: str, knobs: Knobs | None) -> Score:
    with Ranks(train, N, arguments={"name": name, "knobs": knobs}) as ranks:
        scores = [Score(**value) for value in ranks.values(timeout=LIMIT)]
    if len(set(scores)) > 1:
        raise RuntimeError(f"the ranks ended unequal: {scores}")
    return scores[0]


def train(name: str, knobs: dict[str, Any] | None) -> dict[str, float]:
    """One rank: its consensus' score."""
    make, step = TASKS[name]
    module = Module(make())
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
    order = torch.cat(module.task.batches(SEED, N))
    data = TensorDataset(order)
    # Lightning's own would shuffle
    sampler: Any = DistributedSampler(data, N, int(os.environ["RANK"]), shuffle=False) if knobs is None else None
    trainer.fit(module, DataLoader(data, module.task.batch, sampler=sampler))
    return asdict(module.task.score(module.model))


class Module(LightningModule):
    """A task for the Trainer."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.model = task, task.model(SEED)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of these samples."""
        return self.task.loss(self.model, batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The task's own, with `ddp`'s learning rate."""
        return self.task.optimize(self.parameters(), self.task.lr)
