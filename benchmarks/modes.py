"""Virtual time to a target loss of every gossip mode with one rank 1x, 4x and 10x slow: what decides the default.

    limit   the samples that `ddp` needs for the target, divided by the sum of all ranks' rates: nobody ever waits, and
            every sample counts as much as one of `ddp`'s
    ddp     the same samples at the pace of the slowest, with a free all-reduce
    none    the control: replicas never talk; its loss is that of their mean at any time

All figures but the limit's are multiples of the limit. Curves are averaged over the seeds before the target is looked
for; the target is what `ddp` reaches after two thirds of its samples. "never" means: not with all samples.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.accuracy import STEP, Point, Run, asynchronous, ddp, factors
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.tasks import Task, characters, digits

SLOW = (1.0, 4.0, 10.0)
POINTS = 48
TARGET = 2 / 3
RESAMPLES = 300
ALLOWED = 1.1  # the goal for the default, at 1x, 4x and 10x

Knobs = Mapping[str, object]
SMALL: Mapping[str, Knobs] = {
    "none": {"mode": "none"},
    "sync": {"mode": "sync"},
    "push_sum": {"mode": "push_sum"},
    "pairwise": {"mode": "pairwise"},
    "pairwise, mixing 1/2": {"mode": "pairwise", "mixing": 0.5},
    "pairwise, period 2": {"mode": "pairwise", "period": 2},
}
LARGE: Mapping[str, Knobs] = {
    "none": {"mode": "none"},
    "push_sum, ring": {"mode": "push_sum"},
    "push_sum, exponential": {"mode": "push_sum", "topology": "exponential"},
    "pairwise, ring": {"mode": "pairwise"},
    "pairwise, exponential": {"mode": "pairwise", "topology": "exponential"},
    "pairwise, exponential, period 2": {"mode": "pairwise", "topology": "exponential", "period": 2},
}
ROLES = {"none": Role.CONTROL, "sync": Role.OTHER}


@dataclass(frozen=True)
class Setting:
    """One task on so many ranks."""

    name: str
    task: Task
    n: int
    seeds: range
    variants: Mapping[str, Knobs]


def settings(quick: bool) -> list[Setting]:
    """What the table is made of."""
    if quick:
        return [Setting("digits, n=4", replace(digits(), passes=3), 4, range(3), SMALL)]
    return [
        Setting("digits, n=4", digits(), 4, range(20), SMALL),
        Setting("characters, n=4", characters(3200), 4, range(3), SMALL),
        Setting("digits, n=16", replace(digits(), batch=4), 16, range(5), LARGE),
    ]


def run(quick: bool) -> Table:
    """Run every variant at every speed on every task."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    claims: list[Claim] = []
    notes = [f"limit in virtual seconds (a fast step is {STEP * 1000:.0f} ms), the rest in multiples of it, with 95 %"]
    for setting in settings(quick):
        baseline = Curves.of([ddp(setting.task, seed, setting.n, points=POINTS) for seed in setting.seeds])
        target = baseline.loss_at(TARGET)
        found = {slow: _at_speed(setting, baseline, target, slow) for slow in SLOW}
        rows += _rows(setting, found)
        claims += _claims(setting, found)
        notes.append(
            f"{setting.name}: target loss {target:.3f}, {len(setting.seeds)} seeds, lr {setting.task.lr:g}, "
            f"{setting.task.batch} samples a step"
        )
    return Table("Time to a target loss, one rank slow", rows, claims, notes)


# -- curves -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """The losses of all seeds at the same numbers of samples."""

    samples: Tensor
    seconds: Tensor  # seeds x points
    losses: Tensor  # seeds x points

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Curves:
        """One row a seed."""
        curves: list[Sequence[Point]] = [run.curve for run in runs]
        return cls(
            torch.tensor([point.samples for point in curves[0]], dtype=torch.float64),
            torch.tensor([[point.seconds for point in curve] for curve in curves], dtype=torch.float64),
            torch.tensor([[point.loss for point in curve] for curve in curves], dtype=torch.float64),
        )

    def pick(self, seeds: Tensor) -> Curves:
        """The curves of these seeds."""
        return Curves(self.samples, self.seconds[seeds], self.losses[seeds])

    def loss_at(self, share: float) -> float:
        """The mean loss after a share of the samples."""
        return self.losses.mean(0)[round(share * len(self.samples)) - 1].item()

    def reaches(self, target: float, axis: Tensor) -> float | None:
        """Where on `axis` the mean loss first is at the target; None: nowhere."""
        losses = self.losses.mean(0)
        below = torch.nonzero(losses <= target).flatten()
        if not len(below):
            return None
        k = int(below[0])
        if k == 0:
            return axis[0].item()
        part = (losses[k - 1] - target) / (losses[k - 1] - losses[k])
        return (axis[k - 1] + part * (axis[k] - axis[k - 1])).item()


@dataclass(frozen=True)
class Found:
    """A multiple of the limit with its bootstrap 95 % interval; None: the target is not reached."""

    ratio: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.ratio is None:
            return "never"
        high = "never" if self.high is None else f"{self.high:.2f}"
        return f"{self.ratio:.2f}" if self.low is None else f"{self.ratio:.2f} ({self.low:.2f} to {high})"


def time_to(curves: Curves, baseline: Curves, target: float, rate: float) -> Found:
    """Time to the target over the limit. Both curves are resampled by seed, in pairs."""

    def ratio(seeds: Tensor) -> float:
        mine, theirs = curves.pick(seeds), baseline.pick(seeds)
        seconds, samples = mine.reaches(target, mine.seconds.mean(0)), theirs.reaches(target, theirs.samples)
        return float("inf") if seconds is None or samples is None else seconds / (samples / rate)

    count = len(curves.losses)
    generator = torch.Generator().manual_seed(0)
    drawn = sorted(ratio(torch.randint(count, (count,), generator=generator)) for _ in range(RESAMPLES))
    low, high = drawn[int(0.025 * RESAMPLES)], drawn[int(0.975 * RESAMPLES)]
    middle = ratio(torch.arange(count))
    if middle == float("inf"):
        return Found(None)
    return Found(middle, low, None if high == float("inf") else high)


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AtSpeed:
    """Everything at one speed of the slow rank."""

    limit: float
    ddp: float
    variants: Mapping[str, Found]


def _at_speed(setting: Setting, baseline: Curves, target: float, slow: float) -> AtSpeed:
    speeds = factors(setting.n, slow)
    rate = setting.task.batch * sum(1 / (STEP * factor) for factor in speeds)
    samples = baseline.reaches(target, baseline.samples)
    assert samples is not None  # the target is on the baseline's curve
    limit = samples / rate
    lock_step = samples / (setting.task.batch * setting.n) * STEP * slow
    found = {}
    for name, knobs in setting.variants.items():
        print(f"  {setting.name}: {name}, slow rank {slow:g}x", file=sys.stderr, flush=True)
        runs = [asynchronous(setting.task, seed, knobs, speeds, points=POINTS) for seed in setting.seeds]
        found[name] = time_to(Curves.of(runs), baseline, target, rate)
    return AtSpeed(limit, lock_step / limit, found)


def _rows(setting: Setting, found: Mapping[float, AtSpeed]) -> list[Row]:
    limits: dict[str, Cell] = {f"slow rank {slow:g}x": at.limit for slow, at in found.items()}
    lock_step: dict[str, Cell] = {f"slow rank {slow:g}x": f"{at.ddp:.2f}" for slow, at in found.items()}
    rows = [
        Row(f"{setting.name}: limit, seconds", Role.LIMIT, limits),
        Row(f"{setting.name}: ddp", Role.OTHER, lock_step),
    ]
    for name in setting.variants:
        cells: dict[str, Cell] = {f"slow rank {slow:g}x": str(at.variants[name]) for slow, at in found.items()}
        rows.append(Row(f"{setting.name}: {name}", ROLES.get(name, Role.RESULT), cells))
    return rows


def _claims(setting: Setting, found: Mapping[float, AtSpeed]) -> list[Claim]:
    """The default reaches the target in at most 1.1x of the limit."""
    if "pairwise" not in setting.variants:
        return []
    claims = []
    for slow, at in found.items():
        ratio = at.variants["pairwise"].ratio
        sentence = f"{setting.name}: pairwise within {ALLOWED:g}x of the limit, slow rank {slow:g}x"
        claims.append(Claim(sentence, ratio is not None and ratio <= ALLOWED))
    return claims
