"""What is taken is what the optimizer would have stepped with: all of that, once, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

from lightning_async.algorithms.taken_gradients import TakenGradients
from lightning_async.replica import Replica


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(4)) for _ in range(3)]


def test_a_gradient_of_the_optimizers_is_taken_once_and_one_of_nobodys_is_left(parameters: list[nn.Parameter]) -> None:
    replica = Replica(parameters)
    taken = TakenGradients(replica, optim.SGD(parameters[:2], 0.1))
    for value, parameter in enumerate(parameters, 1):
        parameter.grad = torch.full((4,), float(value))
    taken.take()
    taken.take()
    assert [p.grad is None for p in parameters] == [True, True, False]
    found = taken.used()
    assert found is not None
    assert [part[0].item() for part in replica.parts(found)] == [1.0, 2.0, 0.0]
    taken.drop()
    assert taken.used() is None  # a batch without any


@pytest.mark.parametrize(("where", "refused"), [(0, 1), (2, 0)])
def test_what_is_not_finite_is_refused_if_the_optimizer_would_have_stepped_with_it(
    where: int, refused: int, parameters: list[nn.Parameter]
) -> None:
    """Under fp16's scaler nobody unscales or clears a gradient that is in no group of the optimizer."""
    taken = TakenGradients(Replica(parameters), optim.SGD(parameters[:2], 0.1))
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    parameters[where].grad = torch.tensor([1.0, float("inf"), 1.0, float("nan")])
    taken.take()
    assert (taken.used() is None) == bool(refused)
    assert taken.refused == refused
    taken.drop()
    parameters[0].grad = torch.ones(4)
    taken.take()
    assert taken.used() is not None
