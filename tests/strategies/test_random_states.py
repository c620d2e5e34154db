"""What is drawn after the states were put back is what would have been drawn."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch

from lightning_async.strategies.random_states import RandomStates


def draw() -> list[float]:
    """Two of each kind, and normal ones: their generators keep every second one for the next call."""
    python = [random.random(), random.gauss(0, 1), random.random()]
    numpy = [np.random.rand(), np.random.randn(), np.random.rand()]
    return [*python, *map(float, numpy), *torch.rand(2).tolist(), *torch.randn(3).tolist()]


@pytest.mark.parametrize("before", range(3))
def test_draws_go_on_from_a_file_of_tensors_and_primitives(before: int) -> None:
    states, file = RandomStates(torch.device("cpu")), io.BytesIO()
    for _ in range(before):
        draw()
    torch.save(states.state_dict(), file)
    drawn = draw()
    draw()
    file.seek(0)
    states.load_state_dict(torch.load(file, weights_only=True))
    assert draw() == drawn


@pytest.mark.gpu
def test_draws_on_a_gpu_go_on() -> None:
    device = torch.device("cuda", 0)
    states = RandomStates(device)
    state = states.state_dict()
    drawn = torch.rand(5, device=device)
    states.load_state_dict(state)
    assert torch.equal(torch.rand(5, device=device), drawn)


def test_a_gpu_state_is_passed_over_without_a_gpu() -> None:
    states = RandomStates(torch.device("cpu"))
    states.load_state_dict({**states.state_dict(), "cuda": torch.zeros(16, dtype=torch.uint8)})
