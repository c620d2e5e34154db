"""Nothing is wrong, two ranks on one machine: what a step of `gossip_ring` costs beside one of `ddp`.

    limit     20 ms: the emulated compute, which the real step cannot be shorter than; with 25 million weights, one
              copy of them in memory: a step of either method writes them at least once more than training alone
    control   mode="none": the same strategy, silent

Variants take turns, and a ratio is made of two in the same turn. A step is the mean over the run without its first
steps (links open, caches are cold) and its last (a meeting). Both ranks share the machine's cores with the network's
threads, so at 25 million weights the figure is one of copies and cores as much as of the method.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median

import torch

from benchmarks.launch import Ranks
from benchmarks.repeat import Measures, Turns, repeat
from benchmarks.subject import Knobs
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.work import Record, Work, fit

N = 2
WARM = 5  # steps that do not count
LIMIT = 600.0
VARIANTS: Mapping[str, Knobs | None] = {"ddp": None, "gossip_ring": {}, "none": {"mode": "none"}}
ROLES = {"ddp": Role.OTHER, "none": Role.CONTROL}


@dataclass(frozen=True)
class Setting:
    """One size of model and step, and the ratio to `ddp` that must hold."""

    name: str
    work: Work
    goal: float
    turns: int


def settings(quick: bool) -> list[Setting]:
    """Much compute and few weights; many weights and no compute but their own."""
    small = Work(N * (80 if quick else 250), step=0.02)
    large = Work(N * (30 if quick else 50), width=2048, layers=7, step=0.0)
    turns = 1 if quick else 5
    return [Setting("20 ms of compute", small, 1.03, turns), Setting("25 M weights", large, 1.0, min(turns, 3))]


def run(quick: bool) -> Table:
    """All variants at both sizes."""
    rows: list[Row] = []
    claims: list[Claim] = []
    for setting in settings(quick):
        turns = repeat(
            {name: partial(_measure, knobs, setting.work) for name, knobs in VARIANTS.items()}, setting.turns
        )
        rows.append(Row(f"{setting.name}: limit", Role.LIMIT, {"step ms": 1000 * physical(setting.work)}))
        rows += [Row(f"{setting.name}: {name}", ROLES.get(name, Role.RESULT), _cells(turns, name)) for name in VARIANTS]
        ratio = turns.ratio("gossip_ring", "ddp", "step")
        claims.append(
            Claim(f"{setting.name}: a step is at most {setting.goal}x of ddp's: {ratio}", ratio.median <= setting.goal)
        )
    return Table(f"{N} ranks, nothing wrong: time of a step", rows, claims)


def physical(work: Work) -> float:
    """Seconds that no step can be shorter than."""
    return work.step or _copy_seconds(sum(p.numel() for p in work.model().parameters()))


def _copy_seconds(numel: int) -> float:
    """One copy of so many weights."""
    source, target = torch.zeros(numel), torch.zeros(numel)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _measure(knobs: Knobs | None, work: Work) -> Measures:
    with Ranks(fit, N, arguments=work.arguments(knobs)) as ranks:
        records = [Record(**value) for value in ranks.values(timeout=LIMIT)]
    steps = [[seconds for _, seconds in record.gaps()][WARM:] for record in records]
    return {
        "step": fmean(fmean(seconds) for seconds in steps),
        "median": fmean(median(seconds) for seconds in steps),
        "longest": max(max(seconds) for seconds in steps),
        "folded": fmean(record.folded / len(record.marks) for record in records),
    }


def _cells(turns: Turns, name: str) -> dict[str, Cell]:
    return {
        "step ms": 1000 * turns.of(name, "step").median,
        "median ms": 1000 * turns.of(name, "median").median,
        "longest ms": 1000 * turns.of(name, "longest").median,
        "step / ddp": str(turns.ratio(name, "ddp", "step")),
        "median / ddp": str(turns.ratio(name, "ddp", "median")),
        "folds a step": turns.of(name, "folded").median,
    }
