"""What late gradients cost in accuracy: the delayed pipeline beside backpropagation, in pairs of one seed each.

    limit       backpropagation: one stage, no delay
    control     backpropagation at a third of its learning rate, and at three times as much; and of the last quarter of
                the blocks only, the others as they were drawn: what early stages are worth
    results     K stages, a gradient for each batch, shrunk by beta at each hop; and the same batches in M = 2(K - 1)
                parts, an update for all of them (ADL), forward with predicted weights

All rows of an optimizer have the same learning rate, schedule, updates and samples, and in pairs the same first weights
and order. With BatchNorm a batch in parts is another network, so there the limit of M parts has as many. Computed by
the simulator, which a run on K ranks equals to the bit (a test of the package says so). The networks of all seeds go
through it at once (`pipeline_nets`). Each net with SGD and momentum, and with AdamW (which sees no factor: there it
goes on the learning rate); learning rates rise over the first tenth and fall to nothing. The last rows take learning
rates that are too large, where shrinking is said to keep deep pipelines stable.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.pipeline_nets import Draws, Job, jobs
from benchmarks.table import Claim, Role, Row, Table
from benchmarks.tasks import Score
from lightning_async.algorithms.scale_free import sees_no_factor
from lightning_async.pipeline.compensate import predicted, scaled
from lightning_async.pipeline.partition import even, spans
from lightning_async.pipeline.simulator import simulate
from lightning_async.pipeline.stage import Stage

SEEDS, POINTS = 10, 0.005
DEPTHS = (2, 3, 4)
BETAS = (1.0, 0.5)
TOO_FAST = (3, 10)
PLAIN, A_THIRD, THRICE, FROZEN = (
    "backpropagation",
    "backpropagation, a third of the lr",
    "backpropagation, 3x the lr",
    "backpropagation, of the last quarter only",
)
STUDENT = 2.262  # of the 95 % interval of a mean of ten
NOTES = [
    "gain: accuracy above backpropagation's, mean over the pairs, and half of its 95 % interval; risen: loss above it",
    "claims: what was gained, in hundredths, of accuracy or by a lower loss; open: the interval holds the bound",
]
WORST = 20.0  # what a run counts that has diverged


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        optimizer: "SGD" or "AdamW".
        lr: Its learning rate.
        stages: How many; 1 is backpropagation.
        beta: The factor at each hop.
        every: The parts of a batch that go through one after the other, for one update (ADL's M).
        predict: Forward with predicted weights.
        trained: How many of four parts of the network, from its end, are trained at all.
    """

    optimizer: str
    lr: float
    stages: int = 1
    beta: float = 1.0
    every: int = 1
    predict: bool = False
    trained: int = 4

    def optimize(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of one stage."""
        if self.optimizer == "SGD":
            return torch.optim.SGD(parameters, self.lr, momentum=0.9, fused=True)
        return torch.optim.AdamW(parameters, self.lr, fused=True)


class _Run:
    """The networks of all seeds in stages, and the steps of their optimizers."""

    def __init__(self, blocks: Sequence[nn.Module], arm: Arm, updates: int) -> None:
        cuts = spans(even(len(blocks), arm.stages), len(blocks))
        self.arm, self.updates = arm, updates
        self.chains = [nn.Sequential(*(blocks[i] for i in span)) for span in cuts]
        self.optimizers = [arm.optimize(chain.parameters()) for chain in self.chains]
        self.blind = sees_no_factor(self.optimizers[0])
        self.done = [0] * arm.stages
        self.stages = [
            Stage(s, arm.stages, chain.parameters(), buffers=chain.buffers()) for s, chain in enumerate(self.chains)
        ]

    def compute(self, stage: int, x: Tensor) -> Tensor:
        """A stage's blocks, with the weights that its optimizer leads to where they are predicted."""
        if not self.arm.predict:
            return self.chains[stage](x)  # type: ignore[no-any-return]
        late = max(0, self.stages[stage].delay - 1) / self.arm.every
        with scaled(self.optimizers[stage], self.factor(stage)), predicted(self.optimizers[stage], late):
            return self.chains[stage](x)  # type: ignore[no-any-return]

    def factor(self, stage: int) -> float:
        """Of the learning rate: up over the first tenth, then down to nothing; and what Adam cannot see."""
        step = self.done[stage]
        shrunk = self.arm.beta ** (self.arm.stages - 1 - stage) if self.blind else 1.0
        return shrunk * min(1.0, 10 * (step + 1) / self.updates) * (1 - step / self.updates)

    def update(self, stage: int) -> None:
        """A step of a stage's optimizer."""
        with scaled(self.optimizers[stage], self.factor(stage)):
            self.optimizers[stage].step()
        self.done[stage] += 1


@cache
def train(job: Job, seeds: range, arm: Arm) -> list[Score]:
    """Train a network for each seed; their losses and accuracies on the validation samples."""
    x, y = job.train
    count = len(x) * job.passes // job.batch
    draws = Draws(seeds)
    blocks = job.blocks(draws)
    orders = draws.orders(len(x), job.passes)[:, : count * job.batch]
    nets = nn.Sequential(*blocks)
    for block in blocks[: len(blocks) * (4 - arm.trained) // 4]:
        block.requires_grad_(False)
    run = _Run(blocks, arm, count)
    batches = torch.split(orders, job.batch // arm.every, dim=1)

    def loss(batch: int, out: Tensor) -> Tensor:
        """The sum over the networks of their mean losses."""
        return len(seeds) * F.cross_entropy(out.flatten(0, -2), y[batches[batch - 1]].flatten())

    simulate(
        run.stages,
        [partial(run.compute, s) for s in range(arm.stages)],
        [x[picks] for picks in batches],
        loss,
        run.update,
        shrink=1.0 if run.blind else arm.beta,
        every=arm.every,
    )
    return _scores(nets.eval(), job, len(seeds))


@torch.no_grad()
def _scores(nets: nn.Module, job: Job, seeds: int) -> list[Score]:
    x, y = job.validation
    found = []
    for logits in nets(x.expand(seeds, *x.shape)):
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten()).item()
        right = (logits.argmax(-1) == y).float().mean().item()
        found.append(Score(min(loss, WORST) if math.isfinite(loss) else WORST, right))
    return found


# -- tables -----------------------------------------------------------------------------------------------------------


def run(quick: bool, net: str | None = None) -> Table:
    """All optimizers, depths and betas; of one of the nets, or of all."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    claims: list[Claim] = []
    seeds = range(1 if quick else SEEDS)
    chosen = [job for job in jobs() if net in (None, job.name)]
    if not chosen:
        raise ValueError(f"`--net` must be one of {', '.join(job.name for job in jobs())}, got {net!r}")
    for job in chosen[: 1 if quick else None]:
        if quick:
            job = replace(job, passes=1)
        for optimizer, lr in (("SGD", job.sgd), ("AdamW", job.adam)):
            found, more = compare(job, Arm(optimizer, lr), DEPTHS[:1] if quick else DEPTHS, seeds)
            rows += found
            claims += [] if quick else more  # one short run decides nothing
        if not quick:
            found, more = too_fast(job, seeds)
            rows += found
            claims += more
    return Table("Late gradients: final validation loss and accuracy", rows, claims, NOTES)


def compare(job: Job, plain: Arm, depths: Sequence[int], seeds: range) -> tuple[list[Row], list[Claim]]:
    """Every depth and beta beside backpropagation, in pairs: as they come, and corrected."""
    controls = {
        A_THIRD: replace(plain, lr=plain.lr / 3),
        THRICE: replace(plain, lr=3 * plain.lr),
        FROZEN: replace(plain, trained=1),
    }
    late = {f"K={k}, beta={beta:g}": replace(plain, stages=k, beta=beta) for k in depths for beta in BETAS}
    corrected = {
        f"K={k}, M={2 * (k - 1)}, predict, beta={beta:g}": replace(
            plain, stages=k, beta=beta, every=2 * (k - 1), predict=True
        )
        for k in depths
        for beta in BETAS
    }
    alone = {arm.every: replace(plain, every=arm.every) for arm in corrected.values()} if job.parts_matter else {}
    parts = {f"{PLAIN}, M={every}": arm for every, arm in alone.items()}
    found, rows, claims = {}, [], []
    for name, arm in ({PLAIN: plain} | late | parts | corrected | controls).items():
        found[name] = train(job, seeds, arm)
        beside = f"{PLAIN}, M={arm.every}" if name in corrected and job.parts_matter else PLAIN
        gains = [mine.accuracy - other.accuracy for mine, other in zip(found[name], found[beside], strict=True)]
        risen = [mine.loss - other.loss for mine, other in zip(found[name], found[beside], strict=True)]
        title = f"{job.name}, {plain.optimizer}: {name}"
        role = Role.RESULT if name in late or name in corrected else Role.CONTROL if name in controls else Role.LIMIT
        means = _means(found[name])
        rows.append(Row(title, role, {**means, "gain": mean(gains), "+-": around(gains), "risen": mean(risen)}))
        told = [within(f"{title}: accuracy", gains), within(f"{title}: loss", [-more for more in risen])]
        claims += told if role is Role.RESULT else []
        _tell(title, arm, means, told)
    return rows, claims


def within(title: str, gains: Sequence[float]) -> Claim:
    """Whether the mean is no more than `POINTS` below zero; "open" where its interval holds that bound."""
    found, error = mean(gains), around(gains) or 0.0
    word = ": open" if abs(found + POINTS) <= error else ""
    points = f"{100 * found:+.2f} +- {100 * error:.2f}"
    return Claim(f"{title} within {100 * POINTS} points of backpropagation: {points}{word}", found >= -POINTS)


def around(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean, by Student's t of `SEEDS` pairs."""
    return STUDENT * stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def too_fast(job: Job, seeds: range) -> tuple[list[Row], list[Claim]]:
    """Where beta below 1 is said to be stable and beta 1 not."""
    rows, claims = [], []
    for times in TOO_FAST:
        fast = Arm("SGD", times * job.sgd)
        arms = {PLAIN: fast} | {f"K=4, beta={beta:g}": replace(fast, stages=4, beta=beta) for beta in BETAS}
        title = f"{job.name}, SGD at {times}x the lr"
        found = {arm: _means(scores) for arm, scores in _trained(job, arms, seeds).items()}
        rows += [Row(f"{title}: {arm}", Role.OTHER, cells) for arm, cells in found.items()]
        late, shrunk = (found[f"K=4, beta={beta:g}"]["loss"] for beta in BETAS)
        claims.append(Claim(f"{title}: K=4 ends lower with beta={BETAS[1]:g}: {shrunk:.3f}, {late:.3f}", shrunk < late))
    return rows, claims


def _means(scores: Sequence[Score]) -> dict[str, float]:
    return {"loss": mean(score.loss for score in scores), "accuracy": mean(score.accuracy for score in scores)}


def _trained(job: Job, arms: dict[str, Arm], seeds: range) -> dict[str, list[Score]]:
    found = {}
    for name, arm in arms.items():
        found[name] = train(job, seeds, arm)
        _tell(f"{job.name}: {name}", arm, _means(found[name]), ())
    return found


def _tell(title: str, arm: Arm, means: dict[str, float], claims: Sequence[Claim]) -> None:
    """How far it is: a table takes minutes."""
    print(
        f"  {title}: lr {arm.lr:g}, {means}",
        *(claim.sentence for claim in claims),
        sep="\n    ",
        file=sys.stderr,
        flush=True,
    )
