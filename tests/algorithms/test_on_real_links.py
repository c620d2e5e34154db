"""The same algorithm objects on real gloo links: the laws hold there too, in a random order of the members' steps."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.gossip import gossip
from lightning_async.algorithms.training import train
from lightning_async.replica import Replica
from lightning_async.transport.rounds import Rounds
from tests.transport.cluster_world import ClusterWorld

N, SIZE = 3, 64
STARTS = torch.randn(N, SIZE, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("speeds", [(1, 1, 1), (1, 1, 10)])
@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["pairwise", "push_sum"])
def test_the_weighted_mean_and_one_samples_weight(mode: str, wire: str, speeds: tuple[int, ...]) -> None:
    world, chance = ClusterWorld(N), random.Random(3)
    algorithms = [gossip(mode, wire=wire) for _ in range(N)]  # type: ignore[arg-type]
    parameters = [nn.Parameter(STARTS[r].clone()) for r in range(N)]
    replicas = [Replica([p]) for p in parameters]
    steps = [300 // s for s in speeds]

    def move(r: int) -> None:
        with torch.no_grad():
            parameters[r][r] += 1.0

    programs = {
        r: train(
            algorithms[r],
            replicas[r],
            world.carriers[r],
            steps=steps[r],
            take_step=lambda k: None,
            optimizer_step=lambda r=r: move(r),
            seconds=lambda me, k: 0.0,
            mass=UNIT,
            rounds=Rounds(world.carriers[r]),
        )
        for r in range(N)
    }
    ends = {}

    def step() -> bool:
        r = chance.choices(list(programs), [1 / speeds[r] for r in programs])[0]
        try:
            next(programs[r])
        except StopIteration as end:
            ends[r] = end.value
            del programs[r]
        return not programs

    world.until(step, limit=60)
    world.close()
    expected = STARTS.mean(0)
    for r in range(N):
        expected[r] += steps[r] / N
    for end in ends.values():
        torch.testing.assert_close(end.consensus, expected, rtol=1e-4, atol=1e-4)
        assert end.waits == 0
        assert end.arrivals
    held = sum(a.mass for a in algorithms) + sum(a.ledger.total_mass() for a in algorithms)
    assert held == N * UNIT
