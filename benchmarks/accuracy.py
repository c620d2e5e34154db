"""Loss and accuracy at equal samples: 4 ranks, one 4x slow, DDP's learning rate, real gradients, paired seeds.

    ddp         its synchronous twin, computed exactly: one model, the mean gradient of four batches
    pairwise, push_sum, sync    the algorithm objects that users run, on the virtual cluster
    none        the control: replicas never talk and are averaged once, at the end
    averaged    what averaging weights could reach at best: in lock-step, all replicas are averaged after every step; it
                is not quite `ddp`, since every rank keeps its own optimizer state (for SGD with momentum it is)

Every variant uses the same samples in the same order; a batch goes to whoever asks next, so fast ranks take more steps.
There is one meeting, at the end: replicas keep their own weights until then. Label skew (fixed shards by label) is
published as it is. The limit is `ddp`: asynchronous is to be within 1 % of its loss and 0.5 points of its accuracy.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor, nn

from benchmarks.subject import GOSSIP, NONE, Knobs, algorithm
from benchmarks.table import Cell, Claim, Role, Row, Table
from benchmarks.tasks import Score, Task, characters, digits
from lightning_async.algorithms.adam import SecondMoment
from lightning_async.algorithms.algorithm import UNIT, Algorithm, Shrink, no_shrink
from lightning_async.algorithms.cyclic_delay import CyclicDelay
from lightning_async.algorithms.exchange import Exchange
from lightning_async.algorithms.training import Trained, Training, train
from lightning_async.algorithms.weighting import excess_rounds
from lightning_async.arrival import Fate
from lightning_async.replica import Replica
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster

STEP = 0.02  # seconds of a fast rank's step
JITTER = 0.1  # a step takes e^N(0, JITTER) times as long
LATENCY, TRAVEL = 0.001, 0.2  # seconds; a replica's weights take TRAVEL of a step to leave their rank
LOSS_MARGIN, POINTS_MARGIN = 1.0, 0.5
RESAMPLES = 10_000
DIRICHLET = 0.1

VARIANTS: Mapping[str, Mapping[str, Knobs]] = {
    GOSSIP: {
        "pairwise": {"mode": "pairwise"},
        "pairwise, period 1": {"mode": "pairwise", "period": 1},
        "push_sum": {"mode": "push_sum"},
        "sync": {"mode": "sync"},
        "none": NONE,
    },
    "async_global": {
        "async_global": {"strategy": "async_global"},
        "8 steps": {"strategy": "async_global", "local_steps": "speed"},
        "sign": {"strategy": "async_global", "wire": "sign"},
        "paper": {"strategy": "async_global", "local_steps": 8, "attenuation": "paper"},
        "sync": {"strategy": "async_global", "mode": "sync", "local_steps": 8},
        "none": NONE,
    },
    "cyclic_delay": {
        "cyclic_delay": {"strategy": "cyclic_delay"},
        "gradient": {"strategy": "cyclic_delay", "push": "gradient"},
        "strict": {"strategy": "cyclic_delay", "push": "gradient", "token": "strict"},
        "lr": {"strategy": "cyclic_delay", "push": "gradient", "compensation": "lr"},
        "dc": {"strategy": "cyclic_delay", "push": "gradient", "compensation": "dc"},
        "none": NONE,
    },
}
"""By strategy; the first is the one with its defaults."""


# -- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """The consensus at some time of a run: what a meeting at that time would have given."""

    seconds: float
    samples: int
    loss: float


@dataclass(frozen=True)
class Run:
    """What became of one variant with one seed.

    Attributes:
        score: Of the consensus.
        spread: Rms distance of the replicas from their mean, in per cent of it.
        folded: Messages folded.
        curve: Scores on the way.
        late: By how many rounds of versions the last rank's messages were later than equal ranks', on average.
    """

    score: Score
    spread: float = 0.0
    folded: int = 0
    curve: Sequence[Point] = ()
    late: float = 0.0


@dataclass
class Plan:
    """Who trains on which batches, and how long each step takes: the k-th batch goes to the k-th rank that asks."""

    batches: list[list[Tensor]]
    seconds: list[list[float]] = field(default_factory=list)


def claim(batches: Sequence[Tensor], factors: Sequence[float], seed: int) -> Plan:
    """Hand the batches out one by one, in virtual time; a step of rank r takes `factors[r]` times `STEP`."""
    jitter = random.Random(seed)
    plan = Plan([[] for _ in factors], [[] for _ in factors])
    asking = [(0.0, r) for r in range(len(factors))]
    for batch in batches:
        now, r = heapq.heappop(asking)
        seconds = factors[r] * STEP * math.exp(jitter.gauss(0.0, JITTER))
        plan.batches[r].append(batch)
        plan.seconds[r].append(seconds)
        heapq.heappush(asking, (now + seconds, r))
    return plan


def deal(batches: Sequence[Tensor], factors: Sequence[float], seed: int) -> Plan:
    """Hand the batches out in turns: equal numbers, for those who step together."""
    jitter, n = random.Random(seed), len(factors)
    plan = Plan([list(batches[r::n]) for r in range(n)])
    for r, factor in enumerate(factors):
        plan.seconds.append([factor * STEP * math.exp(jitter.gauss(0.0, JITTER)) for _ in plan.batches[r]])
    return plan


def factors(n: int, slow: float) -> list[float]:
    """All ranks alike, but for the last one."""
    return [1.0] * (n - 1) + [slow]


def ddp(task: Task, seed: int, n: int = 4, *, points: int = 0, shards: Sequence[Tensor] | None = None) -> Run:
    """One model; every step takes the mean gradient of `n` batches. Seconds in its curve are numbers of steps."""
    model = task.model(seed)
    optimizer = task.optimize(model.parameters(), task.lr)
    plan = deal(task.batches(seed, n), [1.0] * n, seed)
    if shards is not None:
        plan = _from_shards(plan, shards, seed)
    curve, steps = [], len(plan.batches[0])
    for k, batches in enumerate(zip(*plan.batches, strict=True), 1):
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model, torch.cat(batches)))
        optimizer.step()
        if points and k * points // steps > (k - 1) * points // steps:
            curve.append(Point(float(k), k * n * task.batch, task.score(model).loss))
    return Run(task.score(model), curve=curve)


def averaged(task: Task, seed: int, n: int = 4, *, shards: Sequence[Tensor] | None = None) -> Run:
    """Every rank's optimizer steps on its own batch, then all weights are averaged, at once and at no cost."""
    members = [_member(task, seed, {"mode": "none"}) for _ in range(n)]
    plan = deal(task.batches(seed, n), [1.0] * n, seed)
    if shards is not None:
        plan = _from_shards(plan, shards, seed)
    for batches in zip(*plan.batches, strict=True):
        for member, batch in zip(members, batches, strict=True):
            member.optimizer.zero_grad()
            torch.autograd.backward(task.loss(member.model, batch))
            member.optimizer.step()
        mean = _mean(members)
        for member in members:
            member.replica.stand_in(mean)
            member.replica.stay()
    return Run(task.score(members[0].model))


@dataclass
class Member:
    """One rank of a run: its model, optimizer and algorithm."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    replica: Replica
    algorithm: Algorithm
    moment: SecondMoment


def asynchronous(
    task: Task,
    seed: int,
    knobs: Knobs,
    speeds: Sequence[float],
    *,
    points: int = 0,
    shards: Sequence[Tensor] | None = None,
    moment: type[SecondMoment] = SecondMoment,
    shrink: Callable[[], Shrink] = lambda: no_shrink,
) -> Run:
    """One replica a rank on the virtual cluster, one meeting at the end. `moment`: what corrects AdamW's steps.

    `shrink` makes what each member asks before a fold.
    """
    n = len(speeds)
    hand_out = deal if knobs.get("mode") == "sync" else claim
    plan = hand_out(task.batches(seed, n), speeds, seed)
    if shards is not None:
        plan = _from_shards(plan, shards, seed)
    members = [_member(task, seed, knobs, moment) for _ in range(n)]
    for member in members:
        member.algorithm.shrink = shrink()
    size = members[0].replica.flat.numel() * members[0].replica.flat.element_size()
    cluster = VirtualCluster(n, seed=seed, latency=LATENCY, bandwidth=size / (TRAVEL * STEP))
    watch = _Watch(task, members, cluster, sum(map(len, plan.batches)), points)
    programs = {r: _program(task, members[r], cluster, plan, r, watch) for r in range(n)}
    trained: dict[int, Trained] = cluster.run(programs)
    return _outcome(task, members, trained, watch.curve)


def _member(task: Task, seed: int, knobs: Knobs, moment: type[SecondMoment] = SecondMoment) -> Member:
    model = task.model(seed)
    replica = Replica(model.parameters())
    optimizer, found = task.optimize(model.parameters(), task.lr), algorithm(knobs)
    if isinstance(found, CyclicDelay):
        found.optimizer = optimizer  # the server's are made like it
    return Member(model, optimizer, replica, found, moment(optimizer))


def _program(task: Task, member: Member, cluster: VirtualCluster, plan: Plan, r: int, watch: _Watch) -> Training:
    def take_step(step: int) -> None:
        member.optimizer.zero_grad()
        torch.autograd.backward(task.loss(member.model, plan.batches[r][step - 1]))

    carrier = cluster.carriers[r]

    def optimizer_step() -> None:
        member.optimizer.step()
        if SecondMoment.concerns(member.optimizer):
            member.moment.stretch(member.algorithm.averaged_over(len(carrier.members())))
        watch.stepped()

    return train(
        member.algorithm,
        member.replica,
        carrier,
        steps=len(plan.batches[r]),
        take_step=take_step,
        optimizer_step=optimizer_step,
        seconds=lambda me, step: plan.seconds[me][step - 1],
        mass=UNIT,
        rounds=Rounds(carrier),
    )


class _Watch:
    """Scores the mass-weighted mean of the replicas at `points` equal distances in samples; nobody notices."""

    def __init__(self, task: Task, members: list[Member], cluster: VirtualCluster, total: int, points: int) -> None:
        self._task, self._members, self._cluster = task, members, cluster
        self._total, self._points, self._done = total, points, 0
        self._model = task.model(0)
        self._shown = Replica(self._model.parameters())
        self.curve: list[Point] = []

    def stepped(self) -> None:
        """One more batch is done."""
        self._done += 1
        if self._points * self._done // self._total > self._points * (self._done - 1) // self._total:
            self._shown.stand_in(_mean(self._members))
            loss = self._task.score(self._model).loss
            self.curve.append(Point(self._cluster.time, self._done * self._task.batch, loss))


def _mean(members: Sequence[Member]) -> Tensor:
    if isinstance(members[0].algorithm, CyclicDelay):
        return _served([member.algorithm.exchanges for member in members if isinstance(member.algorithm, CyclicDelay)])
    masses = torch.tensor([float(getattr(member.algorithm, "mass", UNIT)) for member in members])
    return torch.einsum("r,rw->w", masses / masses.sum(), torch.stack([member.replica.flat for member in members]))


def _served(exchanges: Sequence[Sequence[Exchange]]) -> Tensor:
    """The server's weights, as far as anybody has pulled them."""
    return torch.cat([max(of_shard, key=lambda x: x.version).base for of_shard in zip(*exchanges, strict=True)])


def _outcome(task: Task, members: list[Member], trained: Mapping[int, Trained], curve: Sequence[Point]) -> Run:
    consensus = trained[0].consensus
    assert consensus is not None
    apart = torch.stack([member.replica.flat - consensus for member in members]).square().sum(1).mean().sqrt()
    members[0].replica.stand_in(consensus)
    folded = sum(arrival.fate is Fate.FOLDED for one in trained.values() for arrival in one.arrivals)
    excess = [excess_rounds(arrival.delay, len(members)) for arrival in trained[len(members) - 1].arrivals]
    late = fmean(excess) if excess else 0.0
    return Run(task.score(members[0].model), 100 * (apart / consensus.norm()).item(), folded, curve, late)


# -- label skew -------------------------------------------------------------------------------------------------------


def skewed(task: Task, n: int, seed: int) -> list[Tensor]:
    """Fixed shards: each label's samples are shared out by Dirichlet(0.1), so that most ranks lack most labels."""
    generator, labels = torch.Generator().manual_seed(seed), task.train[1]
    shards: list[list[Tensor]] = [[] for _ in range(n)]
    draw = random.Random(seed)
    for label in range(int(labels.max()) + 1):
        mine = torch.nonzero(labels == label).flatten()
        mine = mine[torch.randperm(len(mine), generator=generator)]
        shares = [draw.gammavariate(DIRICHLET, 1.0) for _ in range(n)]
        edges = [round(len(mine) * sum(shares[: r + 1]) / sum(shares)) for r in range(n)]
        for shard, part in zip(shards, mine.tensor_split(edges[:-1]), strict=True):
            shard.append(part)
    whole = [torch.cat(shard) for shard in shards]
    return whole if min(map(len, whole)) >= task.batch else skewed(task, n, seed + 1000)


def _from_shards(plan: Plan, shards: Sequence[Tensor], seed: int) -> Plan:
    """The same numbers of batches, but every rank goes round its own shard."""
    generator, own = torch.Generator().manual_seed(seed), []
    for batches, shard in zip(plan.batches, shards, strict=True):
        wanted, order = sum(map(len, batches)), torch.empty(0, dtype=torch.long)
        while len(order) < wanted:
            order = torch.cat([order, shard[torch.randperm(len(shard), generator=generator)]])
        own.append(list(torch.split(order[:wanted], [len(batch) for batch in batches])))
    return Plan(own, plan.seconds)


# -- the table --------------------------------------------------------------------------------------------------------

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """One task as it is run: with how many seeds, and whether shards are fixed and skewed."""

    name: str
    task: Task
    seeds: range
    skew: bool = False


def settings(quick: bool, seeds: int | None = None) -> list[Setting]:
    """What the table is made of; `seeds`: of digits, a quarter of them of characters."""
    if quick:
        few = replace(digits(), passes=3)
        return [
            Setting("digits", few, range(4)),
            Setting("characters", characters(1200), range(2)),
            Setting("digits, label skew", few, range(2), skew=True),
        ]
    count = 40 if seeds is None else seeds
    every = [
        Setting("digits", digits(), range(count)),
        Setting("characters", characters(), range(count // 4)),
        Setting("digits, label skew", digits(), range(count // 2), skew=True),
    ]
    return [setting for setting in every if setting.seeds]


def run(quick: bool, strategy: str = GOSSIP, seeds: int | None = None) -> Table:
    """Run all variants on all tasks, seed by seed."""
    main = next(iter(VARIANTS[strategy]))
    torch.set_num_threads(1)
    chosen = settings(quick, seeds)
    rows: list[Row] = []
    claims: list[Claim] = []
    for setting in chosen:
        runs = measure(setting, strategy)
        compared = {name: Compared.of(runs[name], runs["ddp"]) for name in runs}
        rows += [row(setting, name, runs[name], compared[name], ours=name in VARIANTS[strategy]) for name in runs]
        if not setting.skew:
            claims += claims_of(setting, runs, main, None if quick else compared[main])
    notes = [f"{s.name}: {len(s.seeds)} seeds, lr {s.task.lr:g} (DDP's best of {s.task.grid})" for s in chosen]
    return Table("Equal samples, 4 ranks, one 4x slow, one meeting at the end", rows, claims, [*NOTES, *notes])


NOTES = [
    "loss %, points: paired difference to ddp (loss above it, accuracy above it), with bootstrap 95 % intervals.",
    "<= 1 %, <= 0.5 pt: whether the whole interval is inside the margin: yes, no (wholly outside), or open.",
    "spread: rms distance of the replicas from their mean before the meeting, in per cent of the mean's norm.",
]


def grid(task: Task, seeds: range) -> dict[float, float]:
    """The final loss of `ddp` by learning rate, on seeds of its own: how `task.lr` was chosen."""
    return {lr: fmean(ddp(replace(task, lr=lr), seed).score.loss for seed in seeds) for lr in task.grid}


def measure(setting: Setting, strategy: str = GOSSIP) -> dict[str, list[Run]]:
    """All variants with all seeds, one seed after the other."""
    runs: dict[str, list[Run]] = {"ddp": [], "averaged": [], **{name: [] for name in VARIANTS[strategy]}}
    for seed in setting.seeds:
        print(f"  {setting.name}: seed {seed}", file=sys.stderr, flush=True)
        shards = skewed(setting.task, 4, seed) if setting.skew else None
        runs["ddp"].append(ddp(setting.task, seed, shards=shards))
        runs["averaged"].append(averaged(setting.task, seed, shards=shards))
        for name, knobs in VARIANTS[strategy].items():
            runs[name].append(asynchronous(setting.task, seed, knobs, factors(4, 4.0), shards=shards))
    return runs


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Resample the seeds."""
        sample, generator = torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(0)
        picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
        low, high = sample[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return cls(fmean(values), low, high)

    def below(self, margin: float) -> str:
        """Whether all of it is at most `margin`."""
        return "yes" if self.high <= margin else "no" if self.low > margin else "open"

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


@dataclass(frozen=True)
class Compared:
    """A variant against another with the same seeds: loss in per cent of the other's, accuracy in points."""

    loss: Interval
    points: Interval

    @classmethod
    def of(cls, mine: Sequence[Run], theirs: Sequence[Run]) -> Compared:
        """Pair the runs by seed."""
        scale = 100 / fmean(run.score.loss for run in theirs)
        pairs = [(a.score, b.score) for a, b in zip(mine, theirs, strict=True)]
        return cls(
            Interval.of([scale * (a.loss - b.loss) for a, b in pairs]),
            Interval.of([100 * (a.accuracy - b.accuracy) for a, b in pairs]),
        )

    @property
    def verdicts(self) -> tuple[str, str]:
        """Whether loss, and accuracy, are inside their margins."""
        behind = Interval(-self.points.mean, -self.points.high, -self.points.low)
        return self.loss.below(LOSS_MARGIN), behind.below(POINTS_MARGIN)


ROLES = {"ddp": Role.LIMIT, "averaged": Role.OTHER, "none": Role.CONTROL, "sync": Role.OTHER}


def row(setting: Setting, name: str, runs: Sequence[Run], compared: Compared, *, ours: bool) -> Row:
    """A variant's row; what is `ours` has a spread, and folds."""
    cells: dict[str, Cell] = {
        "loss": fmean(run.score.loss for run in runs),
        "accuracy %": round(100 * fmean(run.score.accuracy for run in runs), 2),
    }
    if name != "ddp":
        cells |= {"loss %": str(compared.loss), "<= 1 %": compared.verdicts[0]}
        cells |= {"points": str(compared.points), "<= 0.5 pt": compared.verdicts[1]}
    if ours:
        cells |= {"spread %": round(fmean(run.spread for run in runs), 2), "folded": int(fmean(r.folded for r in runs))}
    return Row(f"{setting.name}: {name}", ROLES.get(name, Role.RESULT), cells)


def claims_of(setting: Setting, runs: Mapping[str, list[Run]], main: str, compared: Compared | None) -> list[Claim]:
    """Against the control; and against `ddp` (not with the few seeds of a quick run) what the task can resolve."""
    control = Compared.of(runs[main], runs["none"]).loss
    claims = [Claim(f"{setting.name}: {main} has a lower loss than the control: {control} %", control.high < 0)]
    if compared is not None:  # digits: so little loss is left that per cents of it say nothing
        loss, points = compared.verdicts
        what, verdict = ("0.5 points", points) if setting.task.name == "digits" else ("1 % of the loss", loss)
        claims.append(Claim(f"{setting.name}: {main} within {what} of ddp", verdict == "yes"))
    return claims
