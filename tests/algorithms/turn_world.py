"""Members that push by turns on a virtual cluster: what they compute is a quadratic, or counts itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from lightning_async.algorithms.cyclic_delay import CyclicDelay
from lightning_async.algorithms.training import Trained, Training, train
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import Carrier
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster

SIZE, STEP, LR = 48, 0.02, 0.05
TARGETS = torch.randn(32, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
TOKENS = ["skip", "strict"]
PUSHES = ["gradient", "delta"]


def sgd(lr: float = LR, **knobs: Any) -> Callable[[Any], optim.Optimizer]:
    return lambda parameters: optim.SGD(parameters, lr, **knobs)


class Member:
    """One member; its gradients are (weights - its target), or with `counting` -1 in its own coordinates.

    With push="gradient" its own optimizer finds none; the server's is made like it.
    """

    def __init__(self, rank: int, *, counting: bool, **knobs: Any) -> None:
        self.rank, self.counting = rank, counting
        make, push = knobs.pop("make_optimizer", sgd()), knobs.pop("push", "gradient")
        self.algorithm = CyclicDelay(make_optimizer=None if push == "delta" else make, push=push, **knobs)
        self.parameter = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
        self.replica, self.optimizer = Replica([self.parameter]), make([self.parameter])
        self.computed = 0

    def compute(self, step: int) -> None:
        self.computed += 1
        gradient = torch.zeros(SIZE, dtype=torch.float64)
        if self.counting:
            gradient[self.rank] = gradient[16 + self.rank] = -1.0
        else:
            gradient = self.parameter.detach() - TARGETS[self.rank]
        self.parameter.grad = gradient

    def life(
        self, carrier: Carrier, steps: int, seconds: float, compute: Callable[[int], None] | None = None
    ) -> Training:
        """So many steps, each of so many seconds, and a meeting."""
        return train(
            self.algorithm,
            self.replica,
            carrier,
            steps=steps,
            take_step=compute or self.compute,
            optimizer_step=self.optimizer.step,
            seconds=lambda me, step: seconds,
            rounds=Rounds(carrier),
        )


def go(
    speeds: Sequence[float],
    *,
    seconds: float = 1.0,
    counting: bool = False,
    faults: Callable[[VirtualCluster], None] = lambda cluster: None,
    cluster: dict[str, Any] | None = None,
    **knobs: Any,
) -> tuple[list[Member], dict[int, Trained]]:
    """Train for about so many seconds, and meet."""
    virtual = VirtualCluster(len(speeds), **{"silence": 0.5, "patience": 3.0, **(cluster or {})})
    faults(virtual)
    members = [Member(rank, counting=counting, **knobs) for rank in range(len(speeds))]
    programs = {
        m.rank: m.life(virtual.carriers[m.rank], max(1, int(seconds / (STEP * speed))), STEP * speed)
        for m, speed in zip(members, speeds, strict=True)
    }
    return members, virtual.run(programs)


def consensus(trained: dict[int, Trained]) -> Tensor:
    """The same for all, to the bit."""
    found = [one.consensus for one in trained.values() if one.consensus is not None]
    assert found
    assert all(torch.equal(one, found[0]) for one in found)
    return found[0]


def pushes(trained: dict[int, Trained]) -> list[tuple[int, Arrival]]:
    """All pushes with their members, in the order of the server (with one shard)."""
    found = ((rank, arrival) for rank, one in trained.items() for arrival in one.arrivals)
    return sorted(found, key=lambda pair: pair[1].folded)


def arrivals(trained: dict[int, Trained]) -> list[Arrival]:
    """The same, without the members."""
    return [arrival for _, arrival in pushes(trained)]
