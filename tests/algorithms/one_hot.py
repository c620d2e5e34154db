"""A world in which progress can be counted: every step of member r adds 1 to coordinate r of its own replica.

The consensus' coordinate r, times n, divided by r's steps, is what one sample of r moved the consensus by: 1 is fair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_async.algorithms.algorithm import UNIT, Algorithm, Shrink
from lightning_async.algorithms.gossip import gossip
from lightning_async.algorithms.training import Trained, train
from lightning_async.replica import Replica
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster


@dataclass
class Outcome:
    cluster: VirtualCluster
    algorithms: list[Any]
    replicas: list[Replica]
    trained: dict[int, Trained]
    steps: list[int]

    @property
    def consensus(self) -> Tensor:
        consensus = next(iter(self.trained.values())).consensus
        assert consensus is not None
        return consensus

    @property
    def sample_weights(self) -> Tensor:
        """What one sample of each member moved the consensus by; 1 is fair."""
        n = len(self.steps)
        return torch.stack([self.consensus[16 * r] * n / self.steps[r] for r in range(n)])


def run(
    speeds: Sequence[float],
    *,
    seconds: float = 4.0,
    step: float = 0.02,
    start: Callable[[int], Tensor] | None = None,
    lr: float = 1.0,
    masses: Sequence[int] | None = None,
    faults: Callable[[VirtualCluster], None] = lambda cluster: None,
    cluster: dict[str, float] | None = None,
    shrink: Shrink | None = None,
    meets: bool = True,
    make: Callable[..., Algorithm] = gossip,
    **knobs: object,
) -> Outcome:
    """Train `len(speeds)` members for about `seconds`; member r takes `speeds[r]` times `step` a step."""
    n = len(speeds)
    virtual = VirtualCluster(n, **(cluster or {}))  # type: ignore[arg-type]
    faults(virtual)
    algorithms, replicas, programs = [], [], {}
    steps = [max(1, int(seconds / (step * speed))) for speed in speeds]
    for r, carrier in enumerate(virtual.carriers):
        first = torch.zeros(n) if start is None else start(r)
        parameters = [nn.Parameter(first[q : q + 1].clone()) for q in range(n)]
        algorithms.append(make(**knobs))
        if shrink is not None:
            algorithms[r].shrink = shrink
        replicas.append(Replica(parameters))

        def move(parameters: list[nn.Parameter] = parameters, r: int = r) -> None:
            with torch.no_grad():
                parameters[r].add_(lr)

        programs[r] = train(
            algorithms[r],
            replicas[r],
            carrier,
            steps=steps[r],
            take_step=lambda k: None,
            optimizer_step=move,
            seconds=lambda me, k: step * speeds[me],
            mass=masses[r] if masses else UNIT,
            rounds=Rounds(carrier),
            meets=meets,
        )
    return Outcome(virtual, algorithms, replicas, virtual.run(programs), steps)
