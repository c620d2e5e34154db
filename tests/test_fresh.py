"""Who asks is told how well something late agrees with where things go by now; who never asks pays nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_async.fresh import Lately, OwnSteps, cosine, nothing_fresh

X, Y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def test_nothing_is_kept_before_the_first_question() -> None:
    lately = Lately()
    lately.add(X)
    assert lately.cosine(X) is None  # from now on
    lately.add(Y)
    assert lately.cosine(Y) == pytest.approx(1)
    assert lately.cosine(X) == pytest.approx(0)
    assert nothing_fresh() is None


def test_the_mean_is_numpys() -> None:
    draw, lately = np.random.default_rng(0), Lately(memory=0.8)
    lately.cosine(X)
    went, factors = draw.normal(size=(30, 7)), draw.uniform(0.1, 2, 30)
    for direction, factor in zip(went, factors, strict=True):
        lately.add(torch.from_numpy(direction), factor)
    mean = sum(0.8 ** (29 - k) * factors[k] * went[k] for k in range(30))
    late = draw.normal(size=7)
    wanted = late @ mean / np.linalg.norm(late) / np.linalg.norm(mean)
    assert lately.cosine(torch.from_numpy(late)) == pytest.approx(wanted, abs=1e-6)
    assert lately.cosine(torch.from_numpy(late), -0.3) == pytest.approx(-wanted, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_forgotten(bad: float) -> None:
    lately = Lately()
    lately.cosine(X)
    lately.add(bad * Y)
    assert lately.cosine(X) is None
    lately.add(X)
    assert lately.cosine(X) == pytest.approx(1)
    assert lately.cosine(bad * X) is None


def test_own_steps_are_those_of_the_optimizer_alone() -> None:
    steps, weights = OwnSteps(), torch.zeros(2)
    steps.arrive(weights, 1)
    steps.set_off(weights, 1)
    assert steps.cosine(X) is None
    for step in (2, 3):
        steps.set_off(weights, step)
        weights += X
        steps.set_off(weights, step)  # the second optimizer of this batch
        weights += X
        steps.arrive(weights, step)
        steps.arrive(weights - 9 * X, step)
        weights -= 9 * X  # a fold
    assert steps.cosine(X) == pytest.approx(1)


def test_the_cosine_of_nothing_is_0() -> None:
    assert cosine(torch.zeros(3), torch.ones(3)) == 0
    assert cosine(torch.ones(3), torch.ones(3)) == pytest.approx(1)
    assert cosine(torch.ones(3, dtype=torch.bfloat16), -torch.ones(3)) == pytest.approx(-1)
