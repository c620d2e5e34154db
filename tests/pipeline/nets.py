"""A small network in blocks, trained three ways: plainly, by the simulator, and by places on a virtual cluster."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_async.pipeline.partition import even, spans
from lightning_async.pipeline.place import Place
from lightning_async.pipeline.schedule import Work
from lightning_async.pipeline.simulator import simulate
from lightning_async.pipeline.stage import Stage
from lightning_async.transport.virtual import VirtualCluster

WIDTH = 6
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.01)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.01)


def frozen(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.0)


def plain_blocks() -> list[nn.Module]:
    """Every way in which a layer keeps its weights for later: as they are, transposed, scaled, and twice."""
    torch.manual_seed(3)
    return [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
        nn.Sequential(nn.Unflatten(1, (1, WIDTH)), nn.Conv1d(1, 1, 3, padding=1), nn.Flatten()),
        nn.LayerNorm(WIDTH),
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
        nn.PReLU(WIDTH),
        nn.Linear(WIDTH, 2),
    ]


def noisy_blocks() -> list[nn.Module]:
    """With random numbers and statistics."""
    torch.manual_seed(4)
    return [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)),
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.Tanh()),
        nn.BatchNorm1d(WIDTH),
        nn.Sequential(nn.Linear(WIDTH, 2), nn.Dropout(0.1)),
    ]


def data(batches: int, *, last: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Batches of 5 samples; the last one may be smaller."""
    source = torch.Generator().manual_seed(11)
    sizes = [5] * (batches - 1) + [last]
    return [(torch.randn(n, WIDTH, generator=source), torch.randn(n, 2, generator=source)) for n in sizes]


@dataclass
class Net:
    """Blocks cut into stages, each with an optimizer of its own."""

    blocks: list[nn.Module]
    stages: int
    make_optimizer: MakeOptimizer = sgd
    options: dict[str, Any] = field(default_factory=dict)
    seen: list[tuple[int, list[Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks = copy.deepcopy(self.blocks)
        cut = spans(even(len(self.blocks), self.stages), len(self.blocks))
        self.chains = [nn.Sequential(*(self.blocks[i] for i in span)) for span in cut]
        self.optimizers = [self.make_optimizer(list(chain.parameters())) for chain in self.chains]
        self.places = [
            Stage(
                at,
                self.stages,
                chain.parameters(),
                buffers=chain.buffers(),
                reseed=lambda batch, at=at: torch.manual_seed(1000 * batch + at),
                **self.options,
            )
            for at, chain in enumerate(self.chains)
        ]

    def update(self, stage: int) -> None:
        """Step, and remember what was applied."""
        self.seen.append((stage, [p.grad.clone() for p in self.chains[stage].parameters() if p.grad is not None]))
        self.optimizers[stage].step()

    def weights(self) -> list[Tensor]:
        return [x.detach().clone() for chain in self.chains for x in [*chain.parameters(), *chain.buffers()]]

    def gradients(self, stage: int) -> list[list[Tensor]]:
        return [gradients for at, gradients in self.seen if at == stage]


def loss_of(batches: list[tuple[Tensor, Tensor]]) -> Callable[[int, Tensor], Tensor]:
    return lambda batch, out: (out - batches[batch - 1][1]).square().mean()


def train_plainly(net: Net, batches: list[tuple[Tensor, Tensor]], *, every: int = 1) -> list[float]:
    """One process, one graph, no pipeline; an optimizer for each stage all the same."""
    losses = []
    for at, (x, y) in enumerate(batches, start=1):
        for stage, chain in zip(net.places, net.chains, strict=True):
            torch.manual_seed(1000 * at + stage.index)
            x = chain(x)
        loss = (x - y).square().mean()
        (loss / every).backward()
        losses.append(float(loss.detach()))
        if at % every == 0 or at == len(batches):
            for stage in net.places:
                net.update(stage.index)
                for p in stage.parameters:
                    p.grad = None
    return losses


def train_by_table(net: Net, batches: list[tuple[Tensor, Tensor]], **options: Any) -> list[float]:
    return simulate(
        net.places,
        [chain.__call__ for chain in net.chains],
        [x for x, _ in batches],
        loss_of(batches),
        net.update,
        **options,
    )


def train_on_links(
    net: Net,
    batches: list[tuple[Tensor, Tensor]],
    *,
    seconds: Callable[[int, int], float] = lambda stage, batch: 0.01,
    every: int = 1,
    rests: tuple[int, ...] = (),
    cluster: VirtualCluster | None = None,
    **options: Any,
) -> list[float]:
    """One member for each stage, the last stage on member 0, at any speeds."""
    cluster = cluster or VirtualCluster(net.stages, latency=0.004, seed=net.stages)
    ranks = list(reversed(range(net.stages)))
    losses: list[float] = []
    programs = {
        ranks[stage.index]: _life(net, stage, cluster, ranks, batches, seconds, every, rests, losses, options)
        for stage in net.places
    }
    cluster.run(programs)
    return losses


def _life(
    net: Net,
    stage: Stage,
    cluster: VirtualCluster,
    ranks: list[int],
    batches: list[tuple[Tensor, Tensor]],
    seconds: Callable[[int, int], float],
    every: int,
    rests: tuple[int, ...],
    losses: list[float],
    options: dict[str, Any],
) -> Iterator[float | str]:
    mail, compute = cluster.carriers[ranks[stage.index]], net.chains[stage.index].__call__
    place = Place(stage, mail, ranks, update=lambda: net.update(stage.index), **options)
    for batch, (x, y) in enumerate(batches, start=1):
        yield seconds(stage.index, batch)
        ends = batch % every == 0 or batch == len(batches)
        if not stage.last:
            yield from place.turn(batch, x if stage.index == 0 else None, compute, ends=ends)
        else:
            yield from place.begin(batch, ends=ends)
            came = x if stage.index == 0 else (yield from place.arrived(batch)).tensor
            entered, out = stage.enter(batch, came, compute)
            loss = (out - y).square().mean()
            (loss / every).backward()
            losses.append(float(loss.detach()))
            if entered.grad is not None:
                yield from place.give_back(batch, entered.grad)
            yield from place.end()
            if ends:
                net.update(stage.index)
                stage.after_step()
        if batch in rests:
            yield from place.drain()
            yield from place.rest(batch)
    yield from place.drain()
    yield from place.rest(len(batches))
    assert len(stage.stash) == 0


def works(stages: int, batches: int, **options: Any) -> list[Work]:
    """What the simulator did, in its order."""
    done: list[Work] = []
    net = Net(plain_blocks(), stages)
    train_by_table(net, data(batches), watch=done.append, **options)
    return done
