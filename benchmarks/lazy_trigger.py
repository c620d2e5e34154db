"""Which trigger is worth its bytes: silence with mini-batches beside a clock, 4 ranks in step, paired seeds.

    limit      ddp, at the same learning rate
    control    periodic: all ranks silent at the same steps, one in four is sent; what a trigger must beat

Sheets are gathered, so bytes go by who sends. `by trigger` and `by clock` are shares of all decisions, the rest stayed
silent. The rate is a tenth of `ddp`'s best: at that itself a silence of four steps diverges, whoever decides on it.
`same batch` is LASG's trigger (Chen et al. 2020): |gradient now - gradient of the same samples at the weights when it
last sent|, in units of a step; it costs a second backward, so it is here and not among the knobs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import Compared, Plan, Run, ddp, skewed
from benchmarks.lazy_accuracy import SILENT, Knobs, Member, N, Setting, Signed, _row, cnn, signed
from benchmarks.table import Claim, Role, Row, Table
from benchmarks.tasks import Task, digits
from lightning_async.algorithms.lazy_sign import LazySign
from lightning_async.algorithms.sign_trigger import Trigger

SLOWER, FEWER = 10, 3.0
LAZY: Knobs = {"rule": "accumulate", "form": "gather", "max_skip": 7}
VARIANTS: Mapping[str, Knobs] = {
    "always": {"rule": "always", "form": "gather"},
    "periodic": {"rule": "periodic", "form": "gather", "max_skip": SILENT},
    "backlog x10": {**LAZY, "news": "backlog", "threshold": 10.0},
    "change x0.2": {**LAZY, "threshold": 0.2},
    "same batch x0.1": {**LAZY, "threshold": 0.1},
    "same batch x0.001": {**LAZY, "threshold": 0.001},
}


class SameBatch(Trigger):
    """LASG's: the news are computed by the member."""

    news = 0.0
    sent = True

    def decide(self, *arguments: Any) -> bool:
        """Whether to send, and remember it."""
        self.sent = super().decide(*arguments)
        return self.sent

    def _reason(self, number: int, *arguments: Any) -> str | None:
        if number <= self.history:
            return "first"
        if self.news > self._threshold * sum(self._moved) / max(1, len(self._moved)):
            return "trigger"
        return "clock" if self._skipped >= self._max_skip else None


class _ByBatch(LazySign):
    def _new_trigger(self, flat: Tensor) -> Trigger:
        return SameBatch(
            history=self.history, threshold=self.threshold, error_weight=0.0, max_skip=self.max_skip, like=None
        )


class _Again(Member):
    """Computes each batch's gradient twice."""

    def __init__(self, task: Task, seed: int, knobs: Knobs, plan: Plan, rank: int) -> None:
        super().__init__(task, seed, knobs, plan, rank)
        self.algorithm = _ByBatch(**{"min_size": 128, "block": 4096, **knobs})
        self.at = self.now = self.replica.weights()

    def gradient(self, step: int) -> None:
        """At the weights when it last sent, then here."""
        trigger = self.algorithm.trigger
        assert isinstance(trigger, SameBatch)
        self.at = self.now if trigger.sent else self.at
        self.now = self.replica.weights()
        self.replica.stand_in(self.at)
        super().gradient(step)
        before = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.replica.come_back()
        super().gradient(step)
        here = [p.grad for p in self.model.parameters() if p.grad is not None]
        trigger.news = self.task.lr**2 * sum(float((a - b).square().sum()) for a, b in zip(here, before, strict=True))


def settings(quick: bool) -> list[Setting]:
    """What the table is made of."""
    names = tuple(VARIANTS)
    seeds = range(2 if quick else 10)
    slower = [replace(task, lr=task.lr / SLOWER) for task in (cnn(), digits())]
    return [
        Setting("digits, CNN", slower[0], seeds, names),
        Setting("digits, label skew", slower[1], seeds, names, skew=True),
    ]


def run(quick: bool) -> Table:
    """All triggers on both."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    claims: list[Claim] = []
    for setting in settings(quick):
        exact, mine = _measure(setting)
        rows.append(Row(f"{setting.name}: ddp", Role.LIMIT, {"loss": fmean(r.score.loss for r in exact)}))
        rows += [_row(setting, name, mine, exact) for name in VARIANTS]
        claims += _claims(setting, mine)
    return Table(f"A tenth of ddp's rate, {N} ranks in step: silence by trigger and by clock", rows, claims)


def _measure(setting: Setting) -> tuple[list[Run], dict[str, list[Signed]]]:
    exact: list[Run] = []
    mine: dict[str, list[Signed]] = {name: [] for name in VARIANTS}
    for seed in setting.seeds:
        print(f"  {setting.name}: seed {seed}", file=sys.stderr, flush=True)
        shards = skewed(setting.task, N, seed) if setting.skew else None
        exact.append(ddp(setting.task, seed, N, shards=shards))
        for name, knobs in VARIANTS.items():
            member = _Again if name.startswith("same") else None
            mine[name].append(signed(setting.task, seed, knobs, shards=shards, member=member))
    return exact, mine


def _claims(setting: Setting, mine: Mapping[str, Sequence[Signed]]) -> list[Claim]:
    """Which trigger sends a third of the bytes at the loss of signs at every step."""
    always = mine["always"]
    best = None
    for name, runs in mine.items():
        fewer = fmean(a.nbytes / b.nbytes for a, b in zip(always, runs, strict=True))
        pairs = [(b.run, a.run) for a, b in zip(always, runs, strict=True) if a.run and b.run]
        if name in ("always", "periodic") or fewer < FEWER or len(pairs) < len(runs):
            continue
        loss, _ = Compared.of([mine for mine, _ in pairs], [theirs for _, theirs in pairs]).verdicts
        best = name if loss == "yes" else best
    sentence = f"{setting.name}: a trigger sends {FEWER:g}x fewer bytes within 1 % of the loss of signs at every step"
    return [Claim(f"{sentence}: {best or 'none'}", best is not None)]
