"""Members that train with `LazySign` on a virtual cluster or on real links, looked at after every step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_async.algorithms.lazy_sign import LazySign
from lightning_async.algorithms.sign_exchange import Gather, Slices
from lightning_async.algorithms.training import Trained, Training, train
from lightning_async.replica import Replica
from lightning_async.transport.mail import Carrier
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster
from tests.transport.cluster_world import ClusterWorld

Gradient = Callable[[int, int, Tensor], Tensor]
"""(rank, step, weights) -> gradient, flat."""


@dataclass
class Member:
    """One member, and what it looked like after each step."""

    rank: int
    algorithm: LazySign
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    replica: Replica
    trained: Trained = field(default_factory=Trained)
    weights: list[Tensor] = field(default_factory=list)
    rests: list[Tensor] = field(default_factory=list)
    servers: list[tuple[int, Tensor]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    mirrors: list[dict[Any, Tensor]] = field(default_factory=list)

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def look(self, now: float) -> None:
        self.weights.append(self.flat())
        self.times.append(now)
        if len(self.algorithm._members) > 1:
            self.mirrors.append({what: kept.clone() for what, kept in self.what_others_have_too()})
            self.rests.append(self.algorithm.signs.rest.vector.clone())
            rest = getattr(self.algorithm.signs.exchange, "_rest", None)
            self.servers.append((rest.base, rest.vector.clone()) if rest is not None else (0, torch.zeros(0)))

    def what_others_have_too(self) -> Iterator[tuple[Any, Tensor]]:
        """The sum of all that was agreed on; each sheet, with its sender and who has it: a server, or all."""
        signs = self.algorithm.signs
        if signs.common is not None:
            yield "common", signs.common
        if isinstance(exchange := signs.exchange, Slices):
            yield from ((("mean", server), sheet.body) for server, sheet in exchange._means.items())
            yield from (((self.rank, server), sheet.body) for server, sheet in exchange._out.items())
            yield from (((m, self.rank), sheet.body) for m, sheet in exchange._parts.items())
        elif isinstance(exchange, Gather):
            yield from (((m, "all"), sheet.body) for m, sheet in exchange._parts.items())


def members(
    n: int,
    shapes: Sequence[Sequence[int]],
    *,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] = lambda p: torch.optim.SGD(p, 0.1),
    dtype: torch.dtype = torch.float64,
    **knobs: Any,
) -> list[Member]:
    """Members with equal weights."""
    found = []
    for rank in range(n):
        draw = torch.Generator().manual_seed(7)
        parameters = [nn.Parameter(torch.randn(*shape, generator=draw, dtype=dtype)) for shape in shapes]
        replica = Replica(parameters)
        found.append(Member(rank, LazySign(**knobs), parameters, optimizer(parameters), replica))
    return found


def life(
    member: Member,
    carrier: Carrier,
    gradient: Gradient,
    *,
    steps: int,
    lr: Callable[[int], float] | None = None,
    seconds: Callable[[int, int], float] = lambda me, k: 0.02,
) -> Training:
    """Train and meet."""

    def take_step(k: int) -> None:
        if k > 1:
            member.look(carrier.now())
        for group in member.optimizer.param_groups:
            group["lr"] = lr(k) if lr else group["lr"]
        flat, at = gradient(member.rank, k, member.flat()), 0
        for p in member.parameters:
            p.grad = flat[at : at + p.numel()].view(p.shape).clone()
            at += p.numel()

    member.trained = yield from train(
        member.algorithm,
        member.replica,
        carrier,
        steps=steps,
        take_step=take_step,
        optimizer_step=member.optimizer.step,
        seconds=seconds,
        rounds=Rounds(carrier),
    )
    member.look(carrier.now())
    return member.trained


def on_virtual(
    some: list[Member],
    gradient: Gradient,
    *,
    cluster: dict[str, Any] | None = None,
    seen: Callable[[Any], Any] = lambda carrier: carrier,
    **options: Any,
) -> None:
    """Let them live on a virtual cluster; `seen` is what each is given in the place of its carrier."""
    virtual = VirtualCluster(len(some), **{"patience": 5.0, **(cluster or {})})
    virtual.run({c.me: life(some[c.me], seen(c), gradient, **options) for c in virtual.carriers})


def on_real_links(
    some: list[Member],
    gradient: Gradient,
    *,
    seed: int = 3,
    seen: Callable[[Any], Any] = lambda carrier: carrier,
    **options: Any,
) -> ClusterWorld:
    """Let them live in this process over real links, in a random order of steps."""
    world, chance = ClusterWorld(len(some)), random.Random(seed)
    lives: dict[int, Iterator[Any]] = {m.rank: life(m, seen(world.carriers[m.rank]), gradient, **options) for m in some}

    def step() -> bool:
        rank = chance.choice(list(lives))
        try:
            next(lives[rank])
        except StopIteration:
            del lives[rank]
        return not lives

    try:
        world.until(step, limit=60)
    finally:
        world.close()
    return world


LIVES: Mapping[str, Callable[..., object]] = {"virtual": on_virtual, "real": on_real_links}


def quadratic(n: int, d: int, *, spread: float = 1.0, noise: float = 0.0) -> tuple[Gradient, Tensor]:
    """f_m = 1/2 (w - c_m)' A_m (w - c_m), strongly convex; and where the gradients add up to nothing."""
    draw = torch.Generator().manual_seed(1)
    scales = [torch.rand(d, generator=draw, dtype=torch.float64) + 0.5 for _ in range(n)]
    centres = [spread * torch.randn(d, generator=draw, dtype=torch.float64) for _ in range(n)]

    def gradient(rank: int, k: int, w: Tensor) -> Tensor:
        g = scales[rank].to(w) * (w - centres[rank].to(w))
        if noise:
            g = g + noise * torch.randn(d, generator=torch.Generator().manual_seed(1000 * rank + k)).to(w)
        return g

    best = sum(a * c for a, c in zip(scales, centres, strict=True)) / sum(scales)
    assert isinstance(best, Tensor)
    return gradient, best
