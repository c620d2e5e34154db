"""Virtual time to a target loss of cyclic updates: all ranks alike, one of 4 ranks 4x slow, one of 8 ranks 8x slow.

    limit     the samples that synchronous training needs for the target, divided by the sum of all ranks' rates
    sync      synchronous: the same samples at the pace of the slowest, with a free all-reduce
    default   what ranks' own optimizers moved is pushed by turns, with a dynamic delay (`push="delta"`)
    gradient, strict    gradients are, and the optimizer steps on the server; idle holders are passed over, or never
    fixed     strict with one batch a push (`max_accumulate=1`): all wait for the slowest one's turn
    lr, dc    gradient, late pushes compensated
    none      the control: replicas never talk (mode="none" of gossip); its loss is that of their mean at any time

    squares   least squares in 16 dimensions, plain SGD; its control is good too, since all ranks learn the same
    gentle    digits, plain SGD at a learning rate of 0.1
    digits    digits, SGD with a momentum of 0.9 at the best learning rate of synchronous training, 0.1

As in `modes`, on the virtual cluster with real gradients: the figures follow from the seeds. A cyclic run's loss is
that of the server's weights, as anybody has pulled them. "never" means: not with all samples.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD

from benchmarks.accuracy import STEP, asynchronous, ddp, factors
from benchmarks.modes import POINTS, TARGET, Curves, Found, time_to
from benchmarks.subject import NONE, Knobs
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.tasks import Score, Task, digits

FASTER, WITHIN = 3.0, 1.05
WIDE, NOISE = 16, 0.3
SPEEDS: Mapping[str, tuple[int, float]] = {"1,1,1,1": (4, 1.0), "1,1,1,4": (4, 4.0), "7x1 + 8": (8, 8.0)}
"""Columns: how many ranks, and how many times slower the last one is."""
DEFAULT = "default"
GRADIENT: Knobs = {"strategy": "cyclic_delay", "push": "gradient"}
VARIANTS: Mapping[str, Knobs] = {
    "fixed": {**GRADIENT, "token": "strict", "max_accumulate": 1},
    DEFAULT: {"strategy": "cyclic_delay"},
    "gradient": GRADIENT,
    "strict": {**GRADIENT, "token": "strict"},
    "lr": {**GRADIENT, "compensation": "lr"},
    "dc": {**GRADIENT, "compensation": "dc"},
    "none": NONE,
}
ROLES = {"none": Role.CONTROL, "fixed": Role.OTHER}


@dataclass(frozen=True)
class Column:
    """Everything at one set of speeds, but for the limit as a multiple of it."""

    limit: float
    sync: float
    variants: Mapping[str, Found]


def run(quick: bool) -> Table:
    """Every variant at all speeds on each task."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    claims: list[Claim] = []
    notes = [f"limit in virtual seconds (a fast step is {STEP * 1000:.0f} ms), the rest in multiples of it, with 95 %"]
    for task, seeds in _tasks(quick):
        columns = {name: _column(task, seeds, n, slow) for name, (n, slow) in SPEEDS.items()}
        rows += _rows(task, columns)
        claims += _claims(task, columns)
        notes.append(f"{task.name}: {len(seeds)} seeds, lr {task.lr:g}, {task.batch} samples a step")
    return Table("Time to a target loss, cyclic updates", rows, claims, notes)


def _tasks(quick: bool) -> Sequence[tuple[Task, range]]:
    if quick:
        return [(squares(1600), range(2))]
    return [(squares(3200), range(10)), (_gentle(), range(6)), (replace(digits(), passes=6), range(6))]


def _gentle() -> Task:
    return replace(digits(), name="gentle", passes=8, lr=0.1, optimize=lambda parameters, lr: SGD(parameters, lr=lr))


class Squares(Task):
    """A linear map to be learnt; its score is the loss beyond what noise leaves."""

    def loss(self, model: nn.Module, samples: Tensor) -> Tensor:
        """The mean square of these training samples."""
        x, y = self.train
        return F.mse_loss(model(x[samples]), y[samples])

    @torch.no_grad()
    def score(self, model: nn.Module) -> Score:
        """On samples without noise."""
        x, y = self.validation
        return Score(F.mse_loss(model(x), y).item(), 0.0)


def squares(samples: int) -> Squares:
    """So many samples, once."""
    random = torch.Generator().manual_seed(1)
    x, truth = torch.randn(samples, WIDE, generator=random), torch.randn(WIDE, 1, generator=random)
    held_out = torch.randn(500, WIDE, generator=random)
    return Squares(
        "squares",
        train=(x, x @ truth + NOISE * torch.randn(samples, 1, generator=random)),
        validation=(held_out, held_out @ truth),
        build=lambda: nn.Linear(WIDE, 1, bias=False),
        optimize=lambda parameters, lr: SGD(parameters, lr=lr),
        lr=0.02,
        grid=(0.02,),
        batch=8,
    )


def _column(task: Task, seeds: range, n: int, slow: float) -> Column:
    print(f"  {task.name}: {n} ranks, the last one {slow:g}x slow", file=sys.stderr, flush=True)
    baseline = Curves.of([ddp(task, seed, n, points=POINTS) for seed in seeds])
    target, speeds = baseline.loss_at(TARGET), factors(n, slow)
    rate = task.batch * sum(1 / (STEP * factor) for factor in speeds)
    samples = baseline.reaches(target, baseline.samples)
    assert samples is not None  # the target is on the baseline's curve
    variants = {}
    for name, knobs in VARIANTS.items():
        runs = [asynchronous(task, seed, knobs, speeds, points=POINTS) for seed in seeds]
        variants[name] = time_to(Curves.of(runs), baseline, target, rate)
    limit = samples / rate
    return Column(limit, samples / (task.batch * n) * STEP * slow / limit, variants)


def _rows(task: Task, columns: Mapping[str, Column]) -> list[Row]:
    limits: dict[str, Cell] = {name: column.limit for name, column in columns.items()}
    sync: dict[str, Cell] = {name: f"{column.sync:.2f}" for name, column in columns.items()}
    rows = [Row(f"{task.name}: limit, seconds", Role.LIMIT, limits), Row(f"{task.name}: sync", Role.OTHER, sync)]
    for variant in VARIANTS:
        cells: dict[str, Cell] = {name: str(column.variants[variant]) for name, column in columns.items()}
        rows.append(Row(f"{task.name}: {variant}", ROLES.get(variant, Role.RESULT), cells))
    return rows


def _claims(task: Task, columns: Mapping[str, Column]) -> list[Claim]:
    """Of the default, against synchronous training."""
    equal, slow = columns["1,1,1,1"], columns["1,1,1,4"]
    behind, ratio = equal.variants[DEFAULT].ratio, slow.variants[DEFAULT].ratio
    faster = 0.0 if ratio is None else slow.sync / ratio
    said = "never" if behind is None else f"{behind / equal.sync:.2f}x"
    return [
        Claim(f"{task.name}: at 1,1,1,4 {FASTER:g}x faster than synchronous: {faster:.2f}x", faster >= FASTER),
        Claim(
            f"{task.name}: at equal speeds within {WITHIN:g}x of synchronous: {said}",
            behind is not None and behind / equal.sync <= WITHIN,
        ),
    ]
