"""DDP's learning rate is ours too: loss at equal samples by learning rate, 4 ranks of equal speed, paired seeds.

    ddp         its synchronous twin; the limit
    pairwise    the default, on the virtual cluster
    k late      what hides an exchange behind k steps could reach at best: replicas are averaged exactly and at no cost,
                but each knows the others' moves only k steps later
    none        the control: replicas never talk and are averaged once, at the end

`k late` tells what lateness alone costs from what a method costs: whoever does not wait is late by a step or two.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from benchmarks.accuracy import NOTES, Compared, Run, Setting, asynchronous, claims_of, ddp, deal, factors, row
from benchmarks.subject import GOSSIP, NONE, subject
from benchmarks.table import Claim, Row, Table
from benchmarks.tasks import Task, characters, digits
from lightning_async.algorithms.adam import SecondMoment
from lightning_async.replica import Replica

N = 4
LATE = (1, 2)


def run(quick: bool, strategy: str = GOSSIP, seeds: int | None = None) -> Table:
    """The grid of each task, half of the seeds away from DDP's learning rate: there `ddp` and ours alone."""
    torch.set_num_threads(1)
    main = "pairwise" if strategy == GOSSIP else strategy
    rows: list[Row] = []
    claims: list[Claim] = []
    notes = list(NOTES)
    for task, count in _tasks(quick, seeds):
        found: dict[float, dict[str, list[Run]]] = {}
        for lr in task.grid:
            theirs = lr == task.lr
            setting = Setting(f"{task.name}, {lr:g}", replace(task, lr=lr), range(count if theirs else -(-count // 2)))
            found[lr] = runs = _measured(setting, main, strategy, alone=not theirs)
            compared = {name: Compared.of(runs[name], runs["ddp"]) for name in runs}
            for name in runs:
                rows.append(row(setting, name, runs[name], compared[name], ours=name in (main, "none")))
            if theirs:
                claims += claims_of(setting, runs, main, None if quick else compared[main])
        best = {name: _best(found, name) for name in ("ddp", main)}
        told = f"{task.name}: of {task.grid}, {best['ddp']:g} is best for ddp and {best[main]:g} for {main}"
        claims.append(Claim(told, best[main] == best["ddp"]))
        notes.append(f"{task.name}: {count} seeds at {task.lr:g}, which is `task.lr`, and {-(-count // 2)} elsewhere")
    return Table(
        f"Equal samples by learning rate, {N} ranks of equal speed, one meeting at the end", rows, claims, notes
    )


def _tasks(quick: bool, seeds: int | None) -> list[tuple[Task, int]]:
    if quick:
        return [(replace(digits(), passes=2), seeds or 2)]
    return [(digits(), seeds or 40), (characters(), max(1, (seeds or 40) // 4))]


def _measured(setting: Setting, main: str, strategy: str, *, alone: bool) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {}
    task, speeds = setting.task, factors(N, 1.0)
    for seed in setting.seeds:
        print(f"  {setting.name}: seed {seed}", file=sys.stderr, flush=True)
        found = {"ddp": ddp(task, seed, N), main: asynchronous(task, seed, subject(strategy), speeds)}
        if not alone:
            found |= {f"{late} late": averages_late(task, seed, late) for late in LATE}
            found["none"] = asynchronous(task, seed, NONE, speeds)
        for name, one in found.items():
            runs.setdefault(name, []).append(one)
    return runs


def _best(found: Mapping[float, Mapping[str, list[Run]]], name: str) -> float:
    """The learning rate of the lowest mean loss."""
    return min(found, key=lambda lr: fmean(run.score.loss for run in found[lr][name]))


def averages_late(task: Task, seed: int, late: int, n: int = N) -> Run:
    """Every replica is the mean of all as it was `late` steps ago, and its own moves since; steps are stretched."""
    model = task.model(seed)
    shown = Replica(model.parameters())
    ranks = [Rank(task, seed) for _ in range(n)]
    mean, moves = shown.weights(), list[list[Tensor]]()
    for batches in zip(*deal(task.batches(seed, n), [1.0] * n, seed).batches, strict=True):
        recent = moves[len(moves) - late :] if late else []
        start = [sum((all_moves[r] for all_moves in recent), mean) for r in range(n)]
        moves.append([rank.move(at, batch, n) for rank, at, batch in zip(ranks, start, batches, strict=True)])
        if len(moves) > late:
            mean = mean + sum(moves[-1 - late]) / n
    for rest in moves[len(moves) - late :]:
        mean = mean + sum(rest) / n
    shown.stand_in(mean)
    return Run(task.score(model))


class Rank:
    """One model and its optimizer, which may be put anywhere before each step."""

    def __init__(self, task: Task, seed: int) -> None:
        self._task, self._model = task, task.model(seed)
        self._replica = Replica(self._model.parameters())
        self._optimizer = task.optimize(self._model.parameters(), task.lr)
        self._moment = SecondMoment(self._optimizer)

    def move(self, start: Tensor, batch: Tensor, n: int) -> Tensor:
        """Where a step of one of `n` ranks goes from here."""
        self._replica.stand_in(start)
        self._replica.stay()
        self._optimizer.zero_grad()
        torch.autograd.backward(self._task.loss(self._model, batch))
        self._optimizer.step()
        if SecondMoment.concerns(self._optimizer):
            self._moment.stretch(n)
        return self._replica.flat - start
