"""Each correction against its formula, written out; without a delay all of them change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_async.pipeline.compensate import annealed, check_nesterov, predicted, scaled, spike

LR, M = 0.1, 0.9


def _steps(optimizer: torch.optim.Optimizer, p: nn.Parameter, n: int) -> None:
    torch.manual_seed(0)
    for _ in range(n):
        p.grad = torch.randn(3)
        optimizer.step()


def _momentum(**options: float) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64).float())
    return p, torch.optim.SGD([p], LR, momentum=M, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("late", [0.0, 1.0, 2.5])
def test_predicted_weights_of_momentum(late: float) -> None:
    p, optimizer = _momentum()
    _steps(optimizer, p, 3)
    before, velocity = p.detach().clone(), optimizer.state[p]["momentum_buffer"]
    with predicted(optimizer, late):
        assert torch.equal(p, before - late * LR * velocity)
    assert torch.equal(p, before)


def test_predicted_weights_of_adam_are_those_of_its_next_step_with_the_same_gradient() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([p], LR, betas=(0.0, 0.0))
    p.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    with predicted(optimizer, 1.0):
        ahead = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(ahead, p.detach())


def test_nothing_is_predicted_before_the_first_step() -> None:
    p, optimizer = _momentum()
    with predicted(optimizer, 2.0):
        assert torch.equal(p, torch.ones(3))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("late", [0.0, 1.0, 3.0])
def test_spike_compensation(late: float, decay: float, maximize: bool) -> None:
    p, optimizer = _momentum(weight_decay=decay, maximize=maximize)
    velocity, w = torch.zeros(3), torch.ones(3)
    a, b = M**late, (1 - M**late) / (1 - M)
    torch.manual_seed(0)
    for _ in range(4):
        gradient = torch.randn(3)
        p.grad = gradient.clone()
        optimizer.step()
        spike(optimizer, late)
        g: Tensor = (-gradient if maximize else gradient) + decay * w
        velocity = M * velocity + g
        w = w - LR * (a * velocity + b * g)
    torch.testing.assert_close(p.detach(), w)


def test_nesterov_is_for_sgd_with_momentum() -> None:
    check_nesterov(_momentum()[1])
    p = nn.Parameter(torch.ones(3))
    for other in (torch.optim.SGD([p], LR), torch.optim.SGD([p], LR, M, nesterov=True), torch.optim.Adam([p])):
        with pytest.raises(ValueError, match="`compensate='nesterov'` corrects plain SGD with momentum"):
            check_nesterov(other)


def test_a_late_stage_begins_with_smaller_steps() -> None:
    assert annealed(0, 4.0, 100) == 0.25
    assert annealed(50, 4.0, 100) == 0.5
    assert annealed(100, 4.0, 100) == annealed(1000, 4.0, 100) == 1.0
    assert annealed(0, 0.0, 100) == 1.0


def test_scaled_learning_rates_come_back() -> None:
    _, optimizer = _momentum()
    with scaled(optimizer, 0.5):
        assert optimizer.param_groups[0]["lr"] == LR / 2
    assert optimizer.param_groups[0]["lr"] == LR
