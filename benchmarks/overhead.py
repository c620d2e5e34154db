"""Nothing is wrong, ranks on one machine: what a step of `gossip_ring` costs beside one of `ddp`.

    limit     20 ms: the emulated compute, which the real step cannot be shorter than; with 25 million weights, one
              copy of them in memory: a step of either method writes them at least once more than training alone
    control   mode="none": the same strategy, silent

Variants take turns, and a ratio is made of two in the same turn. A step is the mean over the run without its first
steps (links open, caches are cold) and its last (a meeting). Both ranks share the machine's cores with the network's
threads, so at 25 million weights the figure is one of copies and cores as much as of the method.

With four ranks, `gossip_ring` also runs without shared memory: long messages then go through gloo over loopback.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, median

import torch

from benchmarks.launch import Ranks
from benchmarks.repeat import Measures, Spread, Turns, repeat
from benchmarks.subject import Knobs
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.work import Record, Work, fit

N = 2
WARM = 5  # steps that do not count
LIMIT = 600.0
FOUR = 4
GLOO = "gossip_ring, gloo"
VARIANTS: Mapping[str, Knobs | None] = {"ddp": None, "gossip_ring": {}, "none": {"mode": "none"}}
ROLES = {"ddp": Role.OTHER, "none": Role.CONTROL}


@dataclass(frozen=True)
class Setting:
    """One size of model and step, and the ratio to `ddp` (with four ranks: to gloo) that must hold."""

    name: str
    work: Work
    goal: float
    turns: int
    n: int = N

    @property
    def than(self) -> str:
        """What it is compared with."""
        return "ddp" if self.n == N else GLOO

    def variants(self) -> Mapping[str, tuple[Knobs | None, Work]]:
        """Knobs and work by name."""
        found: dict[str, tuple[Knobs | None, Work]] = {name: (knobs, self.work) for name, knobs in VARIANTS.items()}
        return found if self.n == N else found | {GLOO: ({}, replace(self.work, shared_memory=False))}


def settings(quick: bool) -> list[Setting]:
    """Much compute and few weights, emulated (it sleeps) and real; many weights and no compute but their own."""
    small = Work(N * (80 if quick else 250), step=0.02)
    products = Work(N * (60 if quick else 150), batch=256, width=512, layers=3, step=0.0)
    large = Work(N * (30 if quick else 50), width=2048, layers=7, step=0.0)
    four = Work(FOUR * (100 if quick else 900), width=512, layers=6, step=0.0)
    turns = 1 if quick else 5
    return [
        Setting("20 ms of compute", small, 1.03, turns),
        Setting("matrix products", products, 1.03, min(turns, 3)),
        Setting("25 M weights", large, 1.0, min(turns, 3)),
        Setting("4 ranks, 1.3 M weights", four, 1.0, turns, n=FOUR),
    ]


def run(quick: bool) -> Table:
    """All variants at both sizes."""
    rows: list[Row] = []
    claims: list[Claim] = []
    for setting in settings(quick):
        turns = repeat(
            {name: partial(_measure, *how, setting.n) for name, how in setting.variants().items()}, setting.turns
        )
        rows.append(Row(f"{setting.name}: limit", Role.LIMIT, {"step ms": 1000 * physical(setting.work)}))
        for name in setting.variants():
            rows.append(Row(f"{setting.name}: {name}", ROLES.get(name, Role.RESULT), _cells(turns, name)))
        claims.append(_claim(setting, turns.ratio("gossip_ring", setting.than, "step")))
    return Table(f"{N} ranks (where it says so, {FOUR}), nothing wrong: time of a step", rows, claims)


def _claim(setting: Setting, ratio: Spread) -> Claim:
    if setting.n == N:
        sentence = f"{setting.name}: a step is at most {setting.goal}x of ddp's: {ratio}"
        return Claim(sentence, ratio.median <= setting.goal)
    sentence = f"{setting.name}: a step is shorter with shared memory than without: {ratio}"
    return Claim(sentence, ratio.median < setting.goal)


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


def _measure(knobs: Knobs | None, work: Work, n: int = N) -> Measures:
    with Ranks(fit, n, arguments=work.arguments(knobs)) as ranks:
        records = [Record(**value) for value in ranks.values(timeout=LIMIT)]
    seen = [[seconds for _, seconds in record.gaps()][WARM:] for record in records]
    steps = [seconds for seconds in seen if seconds]  # who began last may find nothing left to train on
    return {
        "step": fmean(fmean(seconds) for seconds in steps),
        "median": fmean(median(seconds) for seconds in steps),
        "longest": max(max(seconds) for seconds in steps),
        "cpu": fmean(record.cpu / len(record.marks) for record in records),
        "folded": fmean(record.folded / len(record.marks) for record in records),
    }


def _cells(turns: Turns, name: str) -> dict[str, Cell]:
    return {
        "step ms": 1000 * turns.of(name, "step").median,
        "median ms": 1000 * turns.of(name, "median").median,
        "longest ms": 1000 * turns.of(name, "longest").median,
        "step / ddp": str(turns.ratio(name, "ddp", "step")),
        "median / ddp": str(turns.ratio(name, "ddp", "median")),
        "CPU ms": 1000 * turns.of(name, "cpu").median,
        "folds a step": turns.of(name, "folded").median,
    }
