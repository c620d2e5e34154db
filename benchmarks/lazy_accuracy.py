"""Loss at equal samples when signs travel, and which trigger is worth its bytes: 4 ranks in step, paired seeds.

    limit      ddp: one model, the mean gradient of four batches, computed exactly
    control    periodic: all ranks silent at the same steps; what a trigger must beat at equal bytes

`bytes` are those of all messages of all ranks (bodies and 256 bytes for each header), as a share of what EF-SIGNGD
sends. `by trigger` and `by clock` are shares of all decisions: the rest stayed silent. The tasks are those of
`accuracy`, and a small convolutional net on the digits. In the skewed setting each rank has fixed shards by label.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import Compared, Plan, Run, _from_shards, ddp, deal, skewed
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.tasks import Task, characters, digits
from lightning_async.algorithms.adam import SecondMoment
from lightning_async.algorithms.lazy_sign import LazySign
from lightning_async.algorithms.signs import NotFinite
from lightning_async.algorithms.training import Training, train
from lightning_async.replica import Replica
from lightning_async.transport.mail import Carrier, Message
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster

N = 4
HEADER = 256
SILENT = 3
"""Silent rounds in a row: the control sends one round in four."""
WARM_UP = 10
"""One step in so many, of all, is the warm-up of those variants that have one."""
Knobs = Mapping[str, Any]
SIGNS: Knobs = {"min_size": 128, "block": 4096, "form": "slices", "max_skip": SILENT}
VARIANTS: Mapping[str, Knobs] = {
    "always": {"rule": "always"},
    "always, gather": {"rule": "always", "form": "gather"},
    "always, stretch 1": {"rule": "always", "stretch": 1.0},
    "always, gather, stretch 1": {"rule": "always", "form": "gather", "stretch": 1.0},
    "always, gradient": {"rule": "always", "compress": "gradient"},
    "always, warm-up": {"rule": "always", "warm_up": True},
    "always, gather, warm-up": {"rule": "always", "form": "gather", "warm_up": True},
    "periodic": {"rule": "periodic"},
    "accumulate, change": {"rule": "accumulate", "threshold": 0.8},
    "accumulate, change x10": {"rule": "accumulate", "threshold": 8.0},
    "accumulate, backlog x3": {"rule": "accumulate", "news": "backlog", "threshold": 3.0},
    "accumulate, backlog x10": {"rule": "accumulate", "news": "backlog", "threshold": 10.0},
    "paper": {"rule": "paper", "threshold": 0.8},
    "innovation": {"rule": "innovation", "threshold": 0.8},
}
FEW = ("always", "always, gather", "always, warm-up", "always, gather, warm-up", "periodic")
SOME = (*FEW, "always, gradient", "accumulate, change", "accumulate, backlog x10")


@dataclass(frozen=True)
class Setting:
    """One task as it is run."""

    name: str
    task: Task
    seeds: range
    variants: Sequence[str] = tuple(VARIANTS)
    skew: bool = False


@dataclass(frozen=True)
class Signed:
    """What became of a run with signs; None where the weights grew until a number was not finite."""

    run: Run | None
    nbytes: int
    decisions: Counter[str]


class Counting:
    """A carrier whose accepted messages are counted."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier, self.nbytes = carrier, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._carrier, name)

    def post(self, peer: int, message: Message) -> bool:
        """Count what is taken."""
        taken = self._carrier.post(peer, message)
        if taken:
            body = message.body
            self.nbytes += HEADER + (0 if body is None else body.numel() * body.element_size())
        return taken


def signed(
    task: Task,
    seed: int,
    knobs: Knobs,
    *,
    shards: Sequence[Tensor] | None = None,
    member: Callable[[Task, int, Knobs, Plan, int], Member] | None = None,
) -> Signed:
    """One run on the virtual cluster; `member` makes each rank."""
    plan = deal(task.batches(seed, N), [1.0] * N, seed)
    if shards is not None:
        plan = _from_shards(plan, shards, seed)
    cluster = VirtualCluster(N, seed=seed)
    carriers = [Counting(carrier) for carrier in cluster.carriers]
    members = [(member or Member)(task, seed, knobs, plan, r) for r in range(N)]
    score: Run | None = None
    try:
        cluster.run({r: members[r].life(carriers[r]) for r in range(N)})
        score = Run(task.score(members[0].model))
    except RuntimeError as error:
        if not isinstance(error.__cause__, NotFinite):
            raise
    decisions = sum((m.algorithm.trigger.fired for m in members), Counter[str]())
    return Signed(score, sum(c.nbytes for c in carriers), decisions)


class Member:
    """One rank."""

    def __init__(self, task: Task, seed: int, knobs: Knobs, plan: Plan, rank: int) -> None:
        self.task, self.batches = task, plan.batches[rank]
        self.model = task.model(seed)
        self.replica = Replica(self.model.parameters())
        self.optimizer = task.optimize(self.model.parameters(), task.lr)
        warm_up = len(self.batches) // WARM_UP if knobs.get("warm_up") else 0
        self.algorithm = LazySign(**{**SIGNS, **knobs, "warm_up": warm_up})
        self.moment = SecondMoment(self.optimizer) if SecondMoment.concerns(self.optimizer) else None

    def life(self, carrier: Any) -> Training:
        """Train and meet."""
        return train(
            self.algorithm,
            self.replica,
            carrier,
            steps=len(self.batches),
            take_step=self.gradient,
            optimizer_step=self._step,
            seconds=lambda me, step: 0.02,
            rounds=Rounds(carrier),
        )

    def gradient(self, step: int) -> None:
        """Compute the gradients of a batch."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.task.loss(self.model, self.batches[step - 1]))

    def _step(self) -> None:
        self.optimizer.step()
        if self.moment is not None:
            self.moment.stretch(self.algorithm.averaged_over(N))


def cnn() -> Task:
    """The digits once more, seen by a small convolutional net."""

    def build() -> nn.Module:
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        pooled = [nn.Unflatten(1, (1, 8, 8)), first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*pooled, nn.Flatten(), nn.Linear(128, 10))

    return replace(digits(), name="digits, CNN", build=build)


def settings(quick: bool) -> list[Setting]:
    """What the table is made of."""
    if quick:
        return [
            Setting("digits, CNN", cnn(), range(2), SOME),
            Setting("digits, label skew", replace(digits(), passes=4), range(2), (*SOME, "paper", "innovation"), True),
            Setting("characters", characters(1200), range(1), FEW),
        ]
    return [
        Setting("digits, CNN", cnn(), range(10)),
        Setting("digits, label skew", digits(), range(10), skew=True),
        Setting("characters", characters(), range(10), FEW),
    ]


def run(quick: bool) -> Table:
    """All variants on all tasks."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    claims: list[Claim] = []
    for setting in settings(quick):
        exact, mine = _measure(setting)
        rows.append(Row(f"{setting.name}: ddp", Role.LIMIT, {"loss": fmean(r.score.loss for r in exact)}))
        rows += [_row(setting, name, mine, exact) for name in setting.variants]
        if not quick and not setting.skew:
            ended = [s.run for s in mine["always"] if s.run is not None]
            claims.append(_parity(setting, Compared.of(ended, exact)))
    return Table(f"Equal samples, {N} ranks in step, signs and silence", rows, claims, NOTES)


def _measure(setting: Setting) -> tuple[list[Run], dict[str, list[Signed]]]:
    exact: list[Run] = []
    mine: dict[str, list[Signed]] = {name: [] for name in setting.variants}
    for seed in setting.seeds:
        print(f"  {setting.name}: seed {seed}", file=sys.stderr, flush=True)
        shards = skewed(setting.task, N, seed) if setting.skew else None
        exact.append(ddp(setting.task, seed, N, shards=shards))
        for name in setting.variants:
            mine[name].append(signed(setting.task, seed, VARIANTS[name], shards=shards))
    return exact, mine


def _row(setting: Setting, name: str, mine: Mapping[str, list[Signed]], exact: list[Run]) -> Row:
    runs = mine[name]
    decisions = sum((s.decisions for s in runs), Counter[str]())
    total = max(1, sum(decisions.values()))
    ended = [s.run for s in runs if s.run is not None]
    cells: dict[str, Cell] = {"loss": f"diverged, {len(runs) - len(ended)} of {len(runs)}"}
    if len(ended) == len(runs):
        compared = Compared.of(ended, exact)
        cells = {"loss": fmean(run.score.loss for run in ended)}
        cells["accuracy %"] = round(100 * fmean(run.score.accuracy for run in ended), 2)
        cells |= {"loss %": str(compared.loss), "points": str(compared.points)}
    cells["bytes"] = fmean(a.nbytes / b.nbytes for a, b in zip(runs, mine["always"], strict=True))
    if decisions:
        cells |= {"by trigger": decisions["trigger"] / total, "by clock": decisions["clock"] / total}
    return Row(f"{setting.name}: {name}", Role.CONTROL if name == "periodic" else Role.RESULT, cells)


def _parity(setting: Setting, always: Compared) -> Claim:
    loss, points = always.verdicts
    what, verdict = ("1 % of the loss", loss) if setting.task.name == "characters" else ("0.5 points", points)
    return Claim(f"{setting.name}: signs at every step are within {what} of ddp", verdict == "yes")


NOTES = [
    "loss %, points: paired difference to ddp (loss above it, accuracy above it), with bootstrap 95 % intervals.",
    f"Tensors below {SIGNS['min_size']} numbers travel whole; blocks of {SIGNS['block']}; max_skip {SILENT}.",
]
