"""Members that meet and go on: legs of steps with a meeting at the end of each."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_async.algorithms.algorithm import UNIT, Shrink, no_shrink
from lightning_async.algorithms.gossip import gossip
from lightning_async.arrival import Arrival
from lightning_async.replica import Replica
from lightning_async.transport.mail import Carrier
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import Program, VirtualCluster

SIZE, STEP = 24, 0.02


class Member:
    """One member, whose every step moves it by numbers of its own."""

    def __init__(
        self, rank: int, *, lr: float = 1.0, speed: float = 1.0, shrink: Shrink = no_shrink, **knobs: Any
    ) -> None:
        self.rank, self.lr, self.speed, self.shrink, self.knobs = rank, lr, speed, shrink, knobs
        self.algorithm = gossip(**knobs)
        self.algorithm.shrink = shrink
        self.parameter = nn.Parameter(self._numbers(0))
        self.replica = Replica([self.parameter])
        self.arrivals: list[Arrival] = []
        self.consensus: list[Tensor] = []
        self.resumed = False

    def begin(self, carrier: Carrier) -> None:
        self.rounds = Rounds(carrier)
        self.algorithm.begin(self.replica, carrier, UNIT, self.rounds)

    def leg(self, carrier: Carrier, steps: range) -> Program:
        """These steps, and a meeting."""
        algorithm, replica = self.algorithm, self.replica
        for step in steps:
            yield STEP * self.speed
            self.arrivals += yield from algorithm.before_step(replica, carrier, step)
            with torch.no_grad():
                self.parameter.add_(self._numbers(step), alpha=self.lr)
            carrier.at(step)
            self.arrivals += yield from algorithm.after_step(replica, carrier, step)
        self.consensus.append((yield from algorithm.meet(replica, carrier)))
        self.arrivals += algorithm.arrived()

    def resume(self, *, adopted: bool) -> None:
        if adopted:
            self.replica.stand_in(self.consensus[-1])
            self.replica.stay()
        self.algorithm.resume(self.replica, adopted=adopted)
        self.resumed = True

    def take_another_algorithm(self, carrier: Carrier) -> None:
        """A new object of the same knobs, which knows of the old one what a file of its state says."""
        state = through_a_file(self.algorithm.state_dict())
        self.algorithm = gossip(**self.knobs)
        self.algorithm.shrink = self.shrink
        self.algorithm.begin(self.replica, carrier, UNIT, self.rounds)
        self.algorithm.load_state_dict(state)

    def _numbers(self, step: int) -> Tensor:
        return torch.randn(SIZE, generator=torch.Generator().manual_seed(1000 * self.rank + step))


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """What is left of a state that was saved and loaded."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def run(
    speeds: Sequence[float],
    *,
    legs: Sequence[int] = (50, 40),
    adopted: bool = True,
    between: Callable[[Member, Carrier], None] = lambda member, carrier: None,
    faults: Callable[[VirtualCluster], None] = lambda cluster: None,
    cluster: dict[str, float] | None = None,
    **knobs: Any,
) -> list[Member]:
    """Legs of so many steps of the fastest; `between` is called at the meetings, before each goes on."""
    virtual = VirtualCluster(len(speeds), **(cluster or {}))  # type: ignore[arg-type]
    faults(virtual)
    members = [Member(rank, speed=speed, **knobs) for rank, speed in enumerate(speeds)]

    def life(member: Member, carrier: Carrier) -> Program:
        member.begin(carrier)
        first = 1
        for number, leg in enumerate(legs):
            if number:
                between(member, carrier)
                member.resume(adopted=adopted)
            after = first + max(1, int(leg / member.speed))
            yield from member.leg(carrier, range(first, after))
            first = after

    virtual.run({c.me: life(members[c.me], c) for c in virtual.carriers})
    return members
