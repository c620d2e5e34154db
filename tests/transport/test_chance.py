"""The generators go on from where they were put back, in this process or from text."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

from lightning_async.transport import chance


def draw() -> tuple[object, ...]:
    return (*torch.rand(3).tolist(), torch.randn(1).item(), *np.random.rand(2), np.random.randn(), random.gauss(0, 1))


def test_the_same_draws_again() -> None:
    draw()  # numpy and python keep half of a pair of normal numbers
    kept = chance.taken()
    text = json.dumps(chance.write(kept))
    drawn = draw()
    chance.put_back(kept)
    assert draw() == drawn
    chance.put_back(chance.read(json.loads(text)))
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
