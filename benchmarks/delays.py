"""Loss by delay for each law of `async_global`: half of the ranks push corrections that are up to 16 rounds late.

    fast     push after every step                    delay 2 or 3 versions of a shard: a healthy run's
    slow     1x to 33x slower, with as many steps     the others push all the while

    limit    ddp: one model, the mean gradient of four batches
    control  mode="none": replicas never talk and are averaged once, at the end

With `local_steps="speed"` nobody would be late; here the number of steps is fixed, so that delays are what the table
says. On the virtual cluster: every variant trains on the same samples, one row a law, the same seeds. "late by" is the
mean excess of the slow ranks' pushes in rounds, as it was measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch

from benchmarks.accuracy import Run, asynchronous, ddp
from benchmarks.subject import NONE, Knobs
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.tasks import Task, characters, digits

N = 4
FACTORS = (1, 3, 5, 9, 17, 33)
LAWS = ("none", "poly", "exp", "hinge", "paper")


def run(quick: bool, seeds: int | None = None) -> Table:
    """All laws at all delays on both optimizers; `seeds`: of digits, and a fifth of them, one at least, for AdamW."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    claims: list[Claim] = []
    tasks = _tasks(quick, seeds)
    for task, chosen in tasks:
        factors = FACTORS[::2] if quick else FACTORS
        limit = fmean(ddp(task, seed, N).score.loss for seed in chosen)
        table = {law: [_mean(task, chosen, _knobs(law), factor) for factor in factors] for law in LAWS}
        control = [_mean(task, chosen, NONE, factor) for factor in factors]
        late = [fmean(run.late for run in runs) for runs in table["none"]]
        names = [f"late by {rounds:.1f}" for rounds in late]
        rows.append(Row(f"{task.name}: ddp", Role.LIMIT, dict.fromkeys(names, limit)))
        rows.append(Row(f"{task.name}: no messages", Role.CONTROL, _cells(names, control)))
        rows += [Row(f"{task.name}: {law}", Role.RESULT, _cells(names, table[law])) for law in LAWS]
        claims.append(_claim(task, [_loss(runs) for runs in table["hinge"]], [_loss(runs) for runs in control]))
    notes = ["columns: rounds of excess, measured", *(f"{task.name}: {len(chosen)} seeds" for task, chosen in tasks)]
    return Table(f"Loss by delay, {N} ranks, half of them late", rows, claims, notes)


def _tasks(quick: bool, seeds: int | None) -> Sequence[tuple[Task, range]]:
    if quick:
        return [(replace(digits(), passes=2), range(2))]
    count = 10 if seeds is None else seeds
    if count < 1:
        raise ValueError(f"`seeds` must be at least 1, got {count}")
    return [(digits(), range(count)), (characters(3200), range(max(1, count // 5)))]


def _knobs(law: str) -> Knobs:
    return {"strategy": "async_global", "local_steps": 1, "attenuation": law}


def _mean(task: Task, seeds: range, knobs: Knobs, factor: float) -> list[Run]:
    print(f"  {task.name}: {dict(knobs)}, slow ranks {factor}x", file=sys.stderr, flush=True)
    speeds = [1.0] * (N // 2) + [float(factor)] * (N - N // 2)
    return [asynchronous(task, seed, knobs, speeds) for seed in seeds]


def _loss(runs: Sequence[Run]) -> float:
    return fmean(run.score.loss for run in runs)


def _cells(names: Sequence[str], columns: Sequence[Sequence[Run]]) -> dict[str, Cell]:
    return {name: _loss(runs) for name, runs in zip(names, columns, strict=True)}


def _claim(task: Task, default: Sequence[float], control: Sequence[float]) -> Claim:
    met = all(mine < theirs for mine, theirs in zip(default, control, strict=True))
    return Claim(f"{task.name}: the default law has a lower loss than the control at every delay", met)
