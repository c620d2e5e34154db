"""The generators go on from where they were put back: in this process, from text, or from a file of tensors."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
import torch

from lightning_async.transport import chance


def draw() -> list[float]:
    """Two of each kind, and normal ones: their generators keep every second one for the next call."""
    python = [random.random(), random.gauss(0, 1), random.random()]
    numpy = [np.random.rand(), np.random.randn(), np.random.rand()]
    return [*python, *map(float, numpy), *torch.rand(2).tolist(), *torch.randn(3).tolist()]


@pytest.mark.parametrize("before", range(3))
def test_the_same_draws_again(before: int) -> None:
    for _ in range(before):
        draw()
    kept, file = chance.taken(), io.BytesIO()
    text = json.dumps(chance.write(kept))
    torch.save(kept, file)
    drawn = draw()
    chance.put_back(kept)
    assert draw() == drawn
    chance.put_back(chance.read(json.loads(text)))
    assert draw() == drawn
    file.seek(0)
    chance.put_back(torch.load(file, weights_only=True))
    assert draw() == drawn


def test_what_is_not_named_stays() -> None:
    kept = chance.taken()
    first = (torch.rand(1).item(), random.random())
    chance.put_back({"torch": kept["torch"]})
    assert torch.rand(1).item() == first[0]
    second = random.random()
    chance.put_back({"python": kept["python"]})
    assert (random.random(), random.random()) == (first[1], second)


def test_a_few_kilobytes() -> None:
    torch.manual_seed(1)
    assert {name: len(text) < 6000 for name, text in chance.write(chance.taken()).items()} == {
        "torch": True,
        "numpy": True,
        "python": True,
    }


@pytest.mark.gpu
def test_draws_on_a_gpu_go_on() -> None:
    device = torch.device("cuda", 0)
    kept = chance.taken(device)
    drawn = torch.rand(5, device=device)
    chance.put_back(kept, device)
    assert torch.equal(torch.rand(5, device=device), drawn)


def test_a_gpu_state_is_passed_over_without_a_gpu() -> None:
    chance.put_back({**chance.taken(), "cuda": torch.zeros(16, dtype=torch.uint8)}, torch.device("cpu"))
