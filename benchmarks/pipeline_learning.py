"""What late gradients cost in accuracy: the delayed pipeline beside backpropagation, in pairs of one seed each.

    limit       backpropagation: one stage, no delay, at the best of three learning rates
    control     backpropagation at a third of it: what a carelessly chosen one costs; and at three times as much
    results     K stages, a gradient for each batch, shrunk by beta at each hop

Computed by the simulator, which a run on K ranks equals to the bit (a test of the package says so). The networks of all
seeds go through it at once, each with its own weights and samples (`Copies`): what one of them computes alone, but for
rounding. Each net with SGD and momentum, and with AdamW (which sees no factor: there it goes on the learning rate);
learning rates rise over the first tenth and fall to nothing. The last rows take learning rates that are too large,
where shrinking is said to keep deep pipelines stable.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.pipeline_nets import Copies, Job, jobs
from benchmarks.table import Claim, Role, Row, Table
from benchmarks.tasks import Score
from lightning_async.pipeline.compensate import scaled, sees_no_factor
from lightning_async.pipeline.partition import even, spans
from lightning_async.pipeline.simulator import simulate
from lightning_async.pipeline.stage import Stage

SEEDS, POINTS = 10, 0.005
DEPTHS = (2, 3, 4)
BETAS = (1.0, 0.5)
TOO_FAST = (3, 10)
PLAIN, A_THIRD, THRICE = "backpropagation", "backpropagation, a third of the lr", "backpropagation, 3x the lr"
WORST = 20.0  # what a run counts that has diverged


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        optimizer: "SGD" or "AdamW".
        lr: Its learning rate.
        stages: How many; 1 is backpropagation.
        beta: The factor at each hop.
    """

    optimizer: str
    lr: float
    stages: int = 1
    beta: float = 1.0

    def optimize(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of one stage."""
        if self.optimizer == "SGD":
            return torch.optim.SGD(parameters, self.lr, momentum=0.9)
        return torch.optim.AdamW(parameters, self.lr)


class _Run:
    """The networks of all seeds in stages, and the steps of their optimizers."""

    def __init__(self, nets: Sequence[Sequence[nn.Module]], arm: Arm, updates: int) -> None:
        self.blocks = [Copies(same) for same in zip(*nets, strict=True)]
        cuts = spans(even(len(self.blocks), arm.stages), len(self.blocks))
        self.arm, self.updates = arm, updates
        self.chains = [nn.Sequential(*(self.blocks[i] for i in span)) for span in cuts]
        self.optimizers = [arm.optimize(chain.parameters()) for chain in self.chains]
        self.blind = sees_no_factor(self.optimizers[0])
        self.done = [0] * arm.stages

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
def train(job: Job, seeds: int, arm: Arm) -> list[Score]:
    """Train a network for each seed; their losses and accuracies on the validation samples."""
    x, y = job.train
    count = len(x) * job.passes // job.batch
    nets, orders = [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        nets.append(job.blocks())
        orders.append(torch.cat([torch.randperm(len(x)) for _ in range(job.passes)])[: count * job.batch])
    run = _Run(nets, arm, count)
    batches = torch.split(torch.stack(orders), job.batch, dim=1)

    def loss(batch: int, out: Tensor) -> Tensor:
        """The sum over the networks of their mean losses."""
        return seeds * F.cross_entropy(out.flatten(0, -2), y[batches[batch - 1]].flatten())

    with sdpa_kernel(SDPBackend.MATH):  # the others cannot be stacked
        simulate(
            [Stage(s, arm.stages, chain.parameters(), buffers=chain.buffers()) for s, chain in enumerate(run.chains)],
            [chain.forward for chain in run.chains],
            [x[picks] for picks in batches],
            loss,
            run.update,
            shrink=1.0 if run.blind else arm.beta,
        )
    return _scores(nn.Sequential(*run.blocks).eval(), job, seeds)


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


def run(quick: bool) -> Table:
    """All nets and optimizers, depths and betas."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    claims: list[Claim] = []
    seeds = 1 if quick else SEEDS
    for job in jobs()[: 1 if quick else None]:
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
    notes = ["gain: points of validation accuracy above backpropagation's, mean over the pairs, and its standard error"]
    return Table("Late gradients: final validation loss and accuracy", rows, claims, notes)


def compare(job: Job, plain: Arm, depths: Sequence[int], seeds: int) -> tuple[list[Row], list[Claim]]:
    """Every depth and beta beside backpropagation, in pairs."""
    arms = {PLAIN: plain, A_THIRD: replace(plain, lr=plain.lr / 3), THRICE: replace(plain, lr=3 * plain.lr)}
    arms |= {f"K={k}, beta={beta:g}": replace(plain, stages=k, beta=beta) for k in depths for beta in BETAS}
    found = _trained(job, arms, seeds)
    rows, claims = [], []
    for arm, scores in found.items():
        gains = [mine.accuracy - other.accuracy for mine, other in zip(scores, found[PLAIN], strict=True)]
        role = {PLAIN: Role.LIMIT, A_THIRD: Role.CONTROL, THRICE: Role.CONTROL}.get(arm, Role.RESULT)
        title = f"{job.name}, {plain.optimizer}: {arm}"
        error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        rows.append(Row(title, role, {**_means(scores), "gain": mean(gains), "error": error}))
        if role is Role.RESULT:
            claims.append(
                Claim(f"{title}: within {POINTS:.1%} of backpropagation: {mean(gains):+.2%}", mean(gains) >= -POINTS)
            )
    return rows, claims


def too_fast(job: Job, seeds: int) -> tuple[list[Row], list[Claim]]:
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


def _trained(job: Job, arms: dict[str, Arm], seeds: int) -> dict[str, list[Score]]:
    found = {}
    for name, arm in arms.items():
        found[name] = train(job, seeds, arm)
        print(
            f"  {job.name}, {arm.optimizer}, lr {arm.lr:g}: {name}: {_means(found[name])}", file=sys.stderr, flush=True
        )
    return found
