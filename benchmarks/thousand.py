"""1,000 ranks with 1,000 weights each on the virtual cluster, 100 steps with real gradients, on one core.

    limit     the same gradients and optimizer steps in a plain loop: no cluster, no messages
    control   mode="none" on the virtual cluster: no messages
    result    gossip_ring's pairwise averages, on the exponential topology

CPU seconds are this machine's; steps, folds and losses follow from the seed. Ranks are up to twice as slow as the
fastest. The losses are those of the mean of all replicas, on data that nobody trained on; there is no meeting.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.table import Cell, Claim, Role, Row, Table
from lightning_async.algorithms.gossip import gossip
from lightning_async.algorithms.training import Trained, Training, train
from lightning_async.arrival import Fate
from lightning_async.replica import Replica
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster

N, STEPS, INPUTS, OUTPUTS, BATCH = 1000, 100, 99, 10, 4
STEP, LATENCY, BANDWIDTH = 0.02, 0.001, 1e8  # seconds, seconds, bytes a second
ALLOWED = 120.0
TRUTH = torch.randn(INPUTS, OUTPUTS, generator=torch.Generator().manual_seed(0))


@dataclass
class Member:
    """One rank: a linear map to be learnt from noisy samples of its own."""

    rank: int
    model: nn.Linear = field(default_factory=lambda: nn.Linear(INPUTS, OUTPUTS))

    def __post_init__(self) -> None:
        nn.init.zeros_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        self.replica = Replica(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.samples = torch.Generator().manual_seed(self.rank + 1)

    def gradients(self, step: int) -> None:
        """Those of a batch that no other rank sees."""
        self.optimizer.zero_grad()
        x = torch.randn(BATCH, INPUTS, generator=self.samples)
        y = x @ TRUTH + torch.randn(BATCH, OUTPUTS, generator=self.samples)
        torch.autograd.backward((self.model(x) - y).square().mean())

    def program(self, cluster: VirtualCluster, mode: str, steps: int) -> Training:
        """Its life on the cluster."""
        carrier = cluster.carriers[self.rank]
        return train(
            gossip(mode, topology="exponential"),  # type: ignore[arg-type]
            self.replica,
            carrier,
            steps=steps,
            take_step=self.gradients,
            optimizer_step=self.optimizer.step,
            seconds=lambda me, step: STEP * (1 + me % 11 / 10),
            rounds=Rounds(carrier),
            meets=False,
        )


def run(quick: bool) -> Table:
    """The loop, the control and the result; one after the other."""
    torch.set_num_threads(1)
    n = 100 if quick else N
    rows = [
        _row("a plain loop", Role.LIMIT, n, _loop),
        _row("none", Role.CONTROL, n, lambda members: _on_cluster(members, "none")),
        _row("pairwise", Role.RESULT, n, lambda members: _on_cluster(members, "pairwise")),
    ]
    seconds = float(rows[-1].cells["CPU s"] or 0)
    return Table(
        f"{n} ranks, {STEPS} steps each, {INPUTS * OUTPUTS + OUTPUTS} weights, on the virtual cluster",
        rows,
        [
            Claim(f"pairwise takes at most {ALLOWED:.0f} s of one core: {seconds:.0f} s", seconds <= ALLOWED),
            Claim("nobody waited", rows[-1].cells["waits"] == 0),
        ],
    )


def _row(name: str, role: Role, n: int, go: Callable[[list[Member]], dict[str, Cell]]) -> Row:
    members = [Member(rank) for rank in range(n)]
    began = time.process_time()
    told = go(members)
    seconds = time.process_time() - began
    weights = torch.stack([member.replica.flat for member in members])
    mean = weights.mean(0)
    spread = (weights - mean).square().sum(1).mean().sqrt() / mean.norm()
    return Row(name, role, {"CPU s": seconds, "loss": _loss(members[0], mean), "spread %": 100 * spread.item(), **told})


def _loop(members: list[Member]) -> dict[str, Cell]:
    for step in range(1, STEPS + 1):
        for member in members:
            member.gradients(step)
            member.optimizer.step()
    return {}


def _on_cluster(members: list[Member], mode: str) -> dict[str, Cell]:
    cluster = VirtualCluster(len(members), seed=0, latency=LATENCY, bandwidth=BANDWIDTH)
    trained: dict[int, Trained] = cluster.run({m.rank: m.program(cluster, mode, STEPS) for m in members})
    folded = sum(arrival.fate is Fate.FOLDED for one in trained.values() for arrival in one.arrivals)
    return {"folds a step": folded / len(members) / STEPS, "waits": sum(one.waits for one in trained.values())}


def _loss(member: Member, mean: Tensor) -> float:
    member.replica.stand_in(mean)
    x = torch.randn(4000, INPUTS, generator=torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        return float((member.model(x) - x @ TRUTH).square().mean())
