"""What late gradients cost in accuracy: the delayed pipeline beside backpropagation, in pairs of one seed each.

    limit       backpropagation: one stage, no delay, at the best of three learning rates
    control     backpropagation at a third of it: what a carelessly chosen one costs; and at three times as much
    results     K stages, a gradient for each batch, shrunk by beta at each hop

Computed by the simulator, which a run on K ranks equals to the bit (a test of the package says so). Each net with SGD
and momentum, and with AdamW (which sees no factor: there it goes on the learning rate); learning rates rise over the
first tenth and fall to nothing. The last rows take learning rates that are too large, where shrinking is said to keep
deep pipelines stable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.pipeline_nets import Job, jobs
from benchmarks.repeat import Measures, repeat
from benchmarks.table import Claim, Role, Row, Table
from benchmarks.tasks import Score
from lightning_async.pipeline.compensate import Compensate, predicted, scaled, sees_no_factor, spike
from lightning_async.pipeline.partition import even, spans
from lightning_async.pipeline.schedule import delay
from lightning_async.pipeline.simulator import simulate
from lightning_async.pipeline.stage import Compute, Stage

SEEDS, POINTS = 10, 0.005
DEPTHS = (2, 3, 4)
BETAS = (1.0, 0.5)
TOO_FAST = (3, 10)
PLAIN, A_THIRD, THRICE = "backpropagation", "backpropagation, a third of the lr", "backpropagation, 3x the lr"
WORST = 20.0  # what a run counts that has diverged
Optimize = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        optimizer: "SGD" or "AdamW".
        lr: Its learning rate.
        stages: How many; 1 is backpropagation.
        beta: The factor at each hop.
        compensate: What is done about the delay besides.
    """

    optimizer: str
    lr: float
    stages: int = 1
    beta: float = 1.0
    compensate: Compensate = "none"

    def late(self, stage: int) -> float:
        """Updates of this stage's own by which its gradients are late."""
        return max(0.0, delay(stage, self.stages) - 1)

    def optimize(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of one stage."""
        if self.optimizer == "SGD":
            return torch.optim.SGD(parameters, self.lr, momentum=0.9)
        return torch.optim.AdamW(parameters, self.lr)


class _Run:
    """One network in stages, and the steps of their optimizers."""

    def __init__(self, job: Job, arm: Arm, updates: int) -> None:
        blocks = job.blocks()
        cuts = spans(even(len(blocks), arm.stages), len(blocks))
        self.arm, self.updates = arm, updates
        self.chains = [nn.Sequential(*(blocks[i] for i in span)) for span in cuts]
        self.optimizers = [arm.optimize(chain.parameters()) for chain in self.chains]
        self.blind = sees_no_factor(self.optimizers[0])
        self.done = [0] * arm.stages

    def factor(self, stage: int) -> float:
        """Of the learning rate: up over the first tenth, then down to nothing; and what Adam cannot see."""
        step = self.done[stage]
        shrunk = self.arm.beta ** (self.arm.stages - 1 - stage) if self.blind else 1.0
        return shrunk * min(1.0, 10 * (step + 1) / self.updates) * (1 - step / self.updates)

    def compute(self, stage: int) -> Compute:
        """The blocks of a stage, with predicted weights where these are wanted."""

        def run(x: Tensor) -> Tensor:
            with ExitStack() as stack:
                if self.arm.compensate == "predict":
                    stack.enter_context(scaled(self.optimizers[stage], self.factor(stage)))
                    stack.enter_context(predicted(self.optimizers[stage], self.arm.late(stage)))
                return self.chains[stage](x)  # type: ignore[no-any-return]

        return run

    def update(self, stage: int) -> None:
        """A step of a stage's optimizer."""
        with scaled(self.optimizers[stage], self.factor(stage)):
            self.optimizers[stage].step()
            if self.arm.compensate == "nesterov":
                spike(self.optimizers[stage], self.arm.late(stage))
        self.done[stage] += 1


@cache
def train(job: Job, seed: int, arm: Arm) -> Measures:
    """Train one network; its loss and accuracy on the validation samples."""
    torch.manual_seed(seed)
    x, y = job.train
    count = len(x) * job.passes // job.batch
    run = _Run(job, arm, count)
    order = torch.cat([torch.randperm(len(x)) for _ in range(job.passes)])[: count * job.batch]
    batches = torch.split(order, job.batch)
    simulate(
        [Stage(s, arm.stages, chain.parameters(), buffers=chain.buffers()) for s, chain in enumerate(run.chains)],
        [run.compute(stage) for stage in range(arm.stages)],
        [x[picks] for picks in batches],
        lambda batch, out: F.cross_entropy(out.flatten(0, -2), y[batches[batch - 1]].flatten()),
        run.update,
        shrink=1.0 if run.blind else arm.beta,
    )
    score = _score(nn.Sequential(*run.chains).eval(), job)
    return {"loss": score.loss, "accuracy": score.accuracy}


@torch.no_grad()
def _score(net: nn.Module, job: Job) -> Score:
    x, y = job.validation
    logits, y = net(x).flatten(0, -2), y.flatten()
    loss = F.cross_entropy(logits, y).item()
    return Score(min(loss, WORST) if math.isfinite(loss) else WORST, (logits.argmax(-1) == y).float().mean().item())


# -- tables -----------------------------------------------------------------------------------------------------------


def run(quick: bool) -> Table:
    """All tasks and optimizers, depths and betas."""
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


def _arms(plain: Arm, depths: Sequence[int]) -> dict[str, Arm]:
    """By name; every result differs from backpropagation in what its name says."""
    arms = {PLAIN: plain, A_THIRD: replace(plain, lr=plain.lr / 3), THRICE: replace(plain, lr=3 * plain.lr)}
    for stages in depths:
        for beta in BETAS:
            arms[f"K={stages}, beta={beta:g}"] = replace(plain, stages=stages, beta=beta)
    return arms


def compare(job: Job, plain: Arm, depths: Sequence[int], seeds: int) -> tuple[list[Row], list[Claim]]:
    """Everything beside backpropagation, in pairs."""
    found = _all_seeds(job, _arms(plain, depths), seeds)
    rows, claims = [], []
    for arm, scores in found.items():
        pairs = zip(scores, found[PLAIN], strict=True)
        gains = [mine["accuracy"] - other["accuracy"] for mine, other in pairs]
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
        found = {arm: _means(scores) for arm, scores in _all_seeds(job, arms, seeds).items()}
        rows += [Row(f"{title}: {arm}", Role.OTHER, cells) for arm, cells in found.items()]
        late, shrunk = (found[f"K=4, beta={beta:g}"]["loss"] for beta in BETAS)
        claims.append(Claim(f"{title}: K=4 ends lower with beta={BETAS[1]:g}: {shrunk:.3f}, {late:.3f}", shrunk < late))
    return rows, claims


def _means(scores: Sequence[Measures]) -> dict[str, float]:
    return {key: mean(score[key] for score in scores) for key in ("loss", "accuracy")}


def _all_seeds(job: Job, arms: dict[str, Arm], seeds: int) -> dict[str, list[Measures]]:
    found: dict[str, list[Measures]] = {name: [] for name in arms}
    for seed in range(seeds):
        turn = repeat({name: partial(train, job, seed, arm) for name, arm in arms.items()}, 1)
        for name in arms:
            found[name] += turn.measures[name]
    return found
