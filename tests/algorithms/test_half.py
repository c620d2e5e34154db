"""Gossip of half-precision weights keeps the mean like that of float32, and its consensus follows a float32 twin's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async.algorithms.gossip import UNIT, Gossip, gossip
from lightning_async.algorithms.training import train
from lightning_async.replica import Replica
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster

MODES = ["pairwise", "push_sum", "sync"]
SPEEDS = [1.0, 1.0, 2.0, 4.0]
TARGET = torch.randn(64, generator=torch.Generator().manual_seed(0))


class Member:
    """It descends a parabola on noisy gradients, the same noise for every dtype."""

    def __init__(self, rank: int, start: Tensor, lr: float) -> None:
        self.weight = nn.Parameter(start)
        self.replica = Replica([self.weight])
        self.optimizer = torch.optim.SGD([self.weight], lr)
        self.noise = torch.Generator().manual_seed(rank)

    def take_step(self, step: int) -> None:
        gradient = self.weight.detach().float() - TARGET + torch.randn(64, generator=self.noise)
        self.weight.grad = gradient.to(self.weight.dtype)


def world(starts: list[Tensor], *, lr: float, mode: Any, steps: int = 200) -> tuple[list[Member], list[Gossip], Tensor]:
    """All members after `steps` (or fewer, for the slow), and their consensus."""
    cluster = VirtualCluster(len(starts), latency=0.01, jitter=1.0)
    members = [Member(rank, start, lr) for rank, start in enumerate(starts)]
    algorithms = [gossip(mode) for _ in starts]
    speeds = SPEEDS if mode != "sync" else [1.0] * len(starts)
    programs = {
        rank: train(
            algorithms[rank],
            member.replica,
            cluster.carriers[rank],
            steps=int(steps / speeds[rank]),
            take_step=member.take_step,
            optimizer_step=member.optimizer.step,
            seconds=lambda me, step: 0.02 * speeds[me],
            mass=UNIT,
            rounds=Rounds(cluster.carriers[rank]),
        )
        for rank, member in enumerate(members)
    }
    consensus = cluster.run(programs)[0].consensus
    assert consensus is not None
    return members, algorithms, consensus


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_replicas_less_than_a_place_apart_agree_on_their_mean(mode: str, dtype: torch.dtype) -> None:
    starts = [torch.full((64,), 1 + rank / 128).to(dtype) for rank in range(4)]
    mean = torch.stack([start.double() for start in starts]).mean(0)
    members, algorithms, consensus = world(starts, lr=0.0, mode=mode)
    masses = torch.tensor([a.mass / UNIT for a in algorithms], dtype=torch.float64)
    wide = torch.stack([m.replica.flat.double() for m in members])
    torch.testing.assert_close((masses[:, None] * wide).sum(0) / 4, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(consensus.double(), mean, rtol=1e-6, atol=0)
    assert float((wide - mean).abs().max()) < 1e-3  # an eighth of a place of bfloat16
    assert all(torch.equal(m.weight.detach(), m.replica.flat.to(dtype)) for m in members)


@pytest.mark.parametrize("mode", MODES)
def test_the_consensus_follows_a_float32_twin(mode: str) -> None:
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        starts = [torch.zeros(64, dtype=dtype) for _ in range(4)]
        _, _, ends[dtype] = world(starts, lr=0.02, mode=mode)
    assert ends[torch.bfloat16].dtype == torch.float32
    apart = (ends[torch.bfloat16] - ends[torch.float32]).abs()
    assert float(apart.mean()) < 0.005
    assert float((ends[torch.float32] - TARGET).abs().mean()) < 0.2  # it is no trivial agreement
