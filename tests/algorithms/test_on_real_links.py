"""The same algorithm objects on real gloo links: the laws hold there too, in a random order of the members' steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.cyclic_delay import CyclicDelay
from lightning_async.algorithms.gossip import gossip
from lightning_async.algorithms.training import Trained, Training, train
from lightning_async.arrival import Fate
from lightning_async.replica import Replica
from lightning_async.transport.rounds import Rounds
from tests.transport.cluster_world import ClusterWorld

N, SIZE = 3, 64
STARTS = torch.randn(N, SIZE, generator=torch.Generator().manual_seed(5))


def lives(programs: dict[int, Training], world: ClusterWorld, speeds: Sequence[int] = (1, 1, 1)) -> dict[int, Trained]:
    """Members step in a random order, the slow ones more seldom; what became of each."""
    chance, ends = random.Random(3), {}

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
    return ends


@pytest.mark.few(1)
@pytest.mark.parametrize("speeds", [(1, 1, 10), (1, 1, 1)])
@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["pairwise", "push_sum"])
def test_the_weighted_mean_and_one_samples_weight(mode: str, wire: str, speeds: tuple[int, ...]) -> None:
    world = ClusterWorld(N)
    algorithms = [gossip(mode, wire=wire) for _ in range(N)]  # type: ignore[arg-type]
    parameters = [nn.Parameter(STARTS[r].clone()) for r in range(N)]
    steps = [300 // s for s in speeds]

    def move(r: int) -> None:
        with torch.no_grad():
            parameters[r][r] += 1.0

    programs = {
        r: train(
            algorithms[r],
            Replica([parameters[r]]),
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
    ends = lives(programs, world, speeds)
    expected = STARTS.mean(0)
    for r in range(N):
        expected[r] += steps[r] / N
    for end in ends.values():
        torch.testing.assert_close(end.consensus, expected, rtol=1e-5, atol=1e-5)
        assert end.waits == 0
        assert end.arrivals
    held = sum(a.mass for a in algorithms) + sum(a.ledger.total_mass() for a in algorithms)
    assert held == N * UNIT


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("mode", "bound", "speeds", "steps"),
    [
        ("pairwise", 3, (1, 1, 10), 300),
        ("push_sum", 3, (1, 1, 10), 300),
        ("none", None, (1, 1, 10), 300),
        ("sync", None, (1, 1, 1), 30),
    ],
)
def test_with_lr_0_the_sum_is_constant_and_what_is_late_is_refused(
    mode: str, bound: int | None, speeds: tuple[int, ...], steps: int
) -> None:
    world, algorithms = ClusterWorld(N), [gossip(mode, max_delay=bound) for _ in range(N)]  # type: ignore[arg-type]
    replicas = [Replica([nn.Parameter(start.clone())]) for start in STARTS]
    programs = {
        r: train(
            algorithms[r],
            replicas[r],
            world.carriers[r],
            steps=steps // speeds[r],
            take_step=lambda k: None,
            optimizer_step=lambda: None,
            seconds=lambda me, k: 0.0,
            rounds=Rounds(world.carriers[r]),
        )
        for r in range(N)
    }
    ends = lives(programs, world, speeds)
    total = torch.zeros(SIZE)
    for algorithm, replica in zip(algorithms, replicas, strict=True):
        total += replica.weights() * (algorithm.mass / UNIT) + algorithm.ledger.total(replica.weights())
    torch.testing.assert_close(total, STARTS.sum(0), rtol=1e-5, atol=1e-5)
    arrivals = [arrival for end in ends.values() for arrival in end.arrivals]
    assert bool(arrivals) == (mode != "none")
    assert any(arrival.fate is Fate.REFUSED for arrival in arrivals) == (bound is not None)
    if bound is not None:
        assert max(arrival.delay for arrival in arrivals if arrival.fate is Fate.FOLDED) <= bound


@pytest.mark.parametrize("token", ["skip", "strict"])
def test_cyclic_updates_push_all_that_was_computed(token: Any) -> None:
    world, parameters = ClusterWorld(N), [nn.Parameter(torch.zeros(40)) for _ in range(N)]
    steps, ends = [40, 30, 20], {}

    def compute(r: int) -> None:
        parameters[r].grad = -torch.eye(N, 40)[r]

    programs = {
        r: train(
            CyclicDelay(push="gradient", make_optimizer=lambda p: torch.optim.SGD(p, 1.0), token=token),
            Replica([parameters[r]]),
            world.carriers[r],
            steps=steps[r],
            take_step=lambda k, r=r: compute(r),
            optimizer_step=lambda: None,
            seconds=lambda me, k: 0.0,
            rounds=Rounds(world.carriers[r]),
        )
        for r in range(N)
    }

    def step() -> bool:
        for r in list(programs):
            try:
                next(programs[r])
            except StopIteration as end:
                ends[r] = end.value
                del programs[r]
        return not programs

    world.until(step, limit=60)
    world.close()
    for end in ends.values():
        assert torch.equal(end.consensus, ends[0].consensus)
        torch.testing.assert_close(N * end.consensus[:N], torch.tensor(steps, dtype=torch.float32))
        assert token == "strict" or end.waits == 0
