"""n steps of the server on an n-th move as far as one synchronous step, and forget as much."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn, optim

from lightning_async.algorithms.server_rates import spread
from lightning_async.algorithms.server_step import MakeOptimizer, server_step

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


def by_turns(make: MakeOptimizer, gradients: Tensor) -> Tensor:
    """Where one step for each member's gradient leads."""
    weights = torch.ones(32)
    rule, n = server_step(make)(weights), gradients.shape[1]
    for members in gradients:
        for gradient in members:
            rule.arrive(weights, gradient, 1 / n, n)
    return weights


@pytest.mark.parametrize("n", [2, 4, 16, 64])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_the_movement_of_a_sample_is_that_of_synchronous_training_within_a_tenth(make: MakeOptimizer, n: int) -> None:
    gradients = torch.linspace(0.5, 2.0, 32).expand(ROUNDS, n, 32)
    moved, should = by_turns(make, gradients) - 1, synchronous(make, gradients) - 1
    torch.testing.assert_close(moved, should, rtol=0.1, atol=0.0)


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_noise_makes_no_difference_to_what_is_linear_in_the_gradient(name: str) -> None:
    n = 16
    gradients = 1.0 + 3.0 * torch.randn(ROUNDS, n, 32, generator=torch.Generator().manual_seed(5))
    moved, should = by_turns(MAKERS[name], gradients) - 1, synchronous(MAKERS[name], gradients) - 1
    assert moved.mean() / should.mean() == pytest.approx(1.0, abs=0.1)


def test_alone_nothing_changes() -> None:
    for make in MAKERS.values():
        group = make([nn.Parameter(torch.ones(1))]).param_groups[0]
        assert all(group[name] == value for name, value in spread(group, 1).items())
