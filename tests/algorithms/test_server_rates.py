"""n steps of the server on an n-th move as far as one synchronous step, and forget as much."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn, optim

from lightning_async.algorithms.server_groups import Groups, MakeOptimizer
from lightning_async.algorithms.server_rates import spread
from lightning_async.algorithms.server_step import ServerStep

ROUNDS = 60
MAKERS: dict[str, MakeOptimizer] = {
    "sgd": lambda p: optim.SGD(p, 0.1, weight_decay=0.01),
    "momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9),
    "nesterov": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, 0.01),
    "adamw": lambda p: optim.AdamW(p, 0.01, weight_decay=0.1),
}


def synchronous(make: MakeOptimizer, gradients: Tensor) -> Tensor:
    """Where one step a round on the mean of the members' gradients leads."""
    parameter = nn.Parameter(torch.ones(32))
    optimizer = make([parameter])
    for members in gradients:
        parameter.grad = members.mean(0)
        optimizer.step()
    return parameter.detach()


def by_turns(make: MakeOptimizer, gradients: Tensor, batches: Sequence[int] = (1,)) -> Tensor:
    """Where pushes of so many batches in turn lead, one or more in the place of each member's gradient."""
    weights, n = torch.ones(32), gradients.shape[1]
    parameter = nn.Parameter(torch.ones(32))
    rule = ServerStep(weights, Groups(make([parameter]), [(parameter, 0)]))
    stream, among = gradients.flatten(0, 1), n * len(batches) / sum(batches)
    sizes = [count for _ in range(len(stream) // sum(batches)) for count in batches]
    for pushed in stream[: sum(sizes)].split(sizes):
        rule.arrive(weights, pushed.sum(0), 1 / n, n, share=len(pushed) / n, among=among)
    return weights


@pytest.mark.few(9)
@pytest.mark.parametrize("batches", [(1,), (2,), (4, 4, 4, 1)], ids=str)
@pytest.mark.parametrize("n", [2, 4, 16, 64])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_the_movement_of_a_sample_is_that_of_synchronous_training_within_a_tenth(
    make: MakeOptimizer, n: int, batches: Sequence[int]
) -> None:
    gradients = torch.linspace(0.5, 2.0, 32).expand(ROUNDS, n, 32)
    moved, should = by_turns(make, gradients, batches) - 1, synchronous(make, gradients) - 1
    torch.testing.assert_close(moved, should, rtol=0.1, atol=0.0)


@pytest.mark.few(8)
@pytest.mark.parametrize(
    ("n", "batches"), [(2, (1,)), *((n, batches) for n in (4, 16, 64) for batches in ((1,), (2,), (4, 4, 4, 1)))]
)
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_where_noise_is_three_times_the_signal_too(name: str, n: int, batches: Sequence[int]) -> None:
    """As long as a push has no more batches than there are members: it would have less noise than their mean."""
    gradients = 1.0 + 3.0 * torch.randn(ROUNDS, n, 32, generator=torch.Generator().manual_seed(5))
    moved, should = by_turns(MAKERS[name], gradients, batches) - 1, synchronous(MAKERS[name], gradients) - 1
    assert moved.mean() / should.mean() == pytest.approx(1.0, abs=0.1)


def test_alone_nothing_changes() -> None:
    for make in MAKERS.values():
        group = make([nn.Parameter(torch.ones(1))]).param_groups[0]
        assert all(group[name] == value for name, value in spread(group, 1).items())
