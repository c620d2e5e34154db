"""What late gradients cost in accuracy: the delayed pipeline beside backpropagation, in pairs of one seed each.

    limit       backpropagation: one stage, no delay
    control     backpropagation at a third of the learning rate: what a carelessly chosen one costs
    results     K stages, gradients shrunk by beta at each hop

Computed by the simulator, which a run on K ranks equals to the bit (a test of the package says so). Tasks: a residual
convolutional network of 20 layers and a residual perceptron of 112 layers on scikit-learn's digits (8x8 pixels), and a
small transformer on the sources of Python's standard library. Each with SGD and momentum, and with AdamW; learning
rates rise over the first tenth and fall to nothing. The last rows take three times the learning rate, where shrinking
is said to keep deep pipelines stable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.repeat import Measures, repeat
from benchmarks.table import Claim, Role, Row, Table
from benchmarks.tasks import CHARACTERS, CONTEXT, Block, Score, characters, digits
from lightning_async.pipeline.compensate import scaled, sees_no_factor
from lightning_async.pipeline.partition import even, spans
from lightning_async.pipeline.simulator import simulate
from lightning_async.pipeline.stage import Stage

SEEDS, POINTS = 10, 0.005
BATCH = 32
Optimize = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Job:
    """A network in blocks, its samples, and how it is trained."""

    name: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    blocks: Callable[[], list[nn.Module]]
    sgd: float
    adam: float
    passes: int
    batch: int = BATCH


class Residual(nn.Module):
    """Two convolutions beside a straight way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        return F.relu(x + self.inner(x))


class Wide(nn.Module):
    """Two layers beside a straight way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        nn.init.zeros_(self.inner[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        return x + self.inner(x)  # type: ignore[no-any-return]


class Embed(nn.Module):
    """Characters and their places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        nn.init.normal_(self.characters.weight, std=0.02)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, width))

    def forward(self, x: Tensor) -> Tensor:
        """One vector for each character."""
        return self.characters(x) + self.places[: x.shape[1]]  # type: ignore[no-any-return]


def convolutional(width: int = 16) -> list[nn.Module]:
    """20 layers: a convolution, nine residual blocks of two, a linear one."""
    first = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
    )
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return [first, *(Residual(width) for _ in range(9)), last]


def deep(width: int = 48) -> list[nn.Module]:
    """112 layers: a linear one, 55 residual blocks of two, a linear one."""
    return [nn.Linear(64, width), *(Wide(width) for _ in range(55)), nn.Linear(width, 10)]


def transformer(width: int = 64, layers: int = 4) -> list[nn.Module]:
    """A small transformer."""
    return [
        Embed(width),
        *(Block(width) for _ in range(layers)),
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CHARACTERS)),
    ]


def jobs(quick: bool) -> list[Job]:
    """The tasks; with `quick`, one pass of the first."""
    task, text = digits(), characters(640 if quick else 6400)
    found = [
        Job("convolutional", task.train, task.validation, convolutional, 0.05, 2e-3, 1 if quick else 16),
        Job("112 layers", task.train, task.validation, deep, 0.02, 1e-3, 1 if quick else 16),
        Job("transformer", text.train, text.validation, transformer, 0.1, 2e-3, 1, 16),
    ]
    return found[:1] if quick else found


def train(job: Job, seed: int, stages: int, beta: float, optimize: Optimize) -> Measures:
    """Train one network; its loss and accuracy on the validation samples."""
    torch.manual_seed(seed)
    blocks = job.blocks()
    chains = [nn.Sequential(*(blocks[i] for i in span)) for span in spans(even(len(blocks), stages), len(blocks))]
    optimizers = [optimize(chain.parameters()) for chain in chains]
    blind = sees_no_factor(optimizers[0])
    x, y = job.train
    order = torch.cat([torch.randperm(len(x)) for _ in range(job.passes)])
    batches = list(torch.split(order[: len(order) // job.batch * job.batch], job.batch))
    factors = [beta ** (stages - 1 - stage) if blind else 1.0 for stage in range(stages)]

    done = [0] * stages

    def update(stage: int) -> None:
        with scaled(optimizers[stage], factors[stage] * _schedule(done[stage], len(batches))):
            optimizers[stage].step()
        done[stage] += 1

    simulate(
        [Stage(s, stages, chain.parameters(), buffers=chain.buffers()) for s, chain in enumerate(chains)],
        [chain.__call__ for chain in chains],
        [x[picks] for picks in batches],
        lambda batch, out: F.cross_entropy(out.flatten(0, -2), y[batches[batch - 1]].flatten()),
        update,
        shrink=1.0 if blind else beta,
    )
    score = _score(nn.Sequential(*chains).eval(), job)
    return {"loss": score.loss, "accuracy": score.accuracy}


def _schedule(step: int, steps: int) -> float:
    """Up over the first tenth, then down to nothing."""
    return min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)


@torch.no_grad()
def _score(net: nn.Module, job: Job) -> Score:
    x, y = job.validation
    logits, y = net(x).flatten(0, -2), y.flatten()
    return Score(F.cross_entropy(logits, y).item(), (logits.argmax(-1) == y).float().mean().item())


def run(quick: bool) -> Table:
    """All tasks, depths, betas and optimizers."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    claims: list[Claim] = []
    for job in jobs(quick):
        for name, lr in (("SGD", job.sgd), ("AdamW", job.adam)):
            found, more = _compare(job, name, lr, [3] if quick else [2, 3, 4], 1 if quick else SEEDS)
            rows += found
            claims += [] if quick else more  # one short run decides nothing
        if not quick:
            rows += _too_fast(job)
    notes = ["accuracy: points of validation accuracy above backpropagation's, mean over the pairs"]
    return Table("Late gradients: final validation loss and accuracy", rows, claims, notes)


def _optimizer(name: str, lr: float) -> Optimize:
    if name == "SGD":
        return lambda parameters: torch.optim.SGD(parameters, lr, momentum=0.9)
    return lambda parameters: torch.optim.AdamW(parameters, lr)


def _compare(job: Job, name: str, lr: float, depths: list[int], seeds: int) -> tuple[list[Row], list[Claim]]:
    arms: dict[str, tuple[int, float, Optimize]] = {
        "backpropagation": (1, 1.0, _optimizer(name, lr)),
        "a third of the lr": (1, 1.0, _optimizer(name, lr / 3)),
    }
    arms |= {f"K={k}, beta={beta:g}": (k, beta, _optimizer(name, lr)) for k in depths for beta in (1.0, 0.5)}
    found = _all_seeds(job, arms, seeds)
    rows, claims = [], []
    for arm, scores in found.items():
        gains = [
            mine["accuracy"] - other["accuracy"] for mine, other in zip(scores, found["backpropagation"], strict=True)
        ]
        role = {"backpropagation": Role.LIMIT, "a third of the lr": Role.CONTROL}.get(arm, Role.RESULT)
        title = f"{job.name}, {name}: {arm}"
        cells = {"loss": mean(s["loss"] for s in scores), "accuracy": mean(s["accuracy"] for s in scores)}
        rows.append(Row(title, role, {**cells, "gain": mean(gains)}))
        if role is Role.RESULT:
            claims.append(
                Claim(f"{title}: within {POINTS:.1%} of backpropagation: {mean(gains):+.2%}", mean(gains) >= -POINTS)
            )
    return rows, claims


def _too_fast(job: Job) -> list[Row]:
    fast = _optimizer("SGD", 3 * job.sgd)
    arms = {"backpropagation": (1, 1.0, fast), "K=4, beta=1": (4, 1.0, fast), "K=4, beta=0.5": (4, 0.5, fast)}
    return [
        Row(
            f"{job.name}, SGD at 3x the lr: {arm}",
            Role.OTHER,
            {"loss": mean(s["loss"] for s in scores), "accuracy": mean(s["accuracy"] for s in scores)},
        )
        for arm, scores in _all_seeds(job, arms, SEEDS).items()
    ]


def _all_seeds(job: Job, arms: dict[str, tuple[int, float, Optimize]], seeds: int) -> dict[str, list[Measures]]:
    found: dict[str, list[Measures]] = {arm: [] for arm in arms}
    for seed in range(seeds):
        turn = repeat({arm: lambda a=arm: train(job, seed, *arms[a]) for arm in arms}, 1)  # type: ignore[misc] # noqa: B023
        for arm in arms:
            found[arm] += turn.measures[arm]
    return found
