"""Who is slow is told by median and usual difference, and what waiting costs by the ranks' own rates."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lightning_async.callbacks.slowness import gain, stragglers


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([0.02, 0.02, 0.02, 0.02], ()),
        ([0.02, 0.08], (1,)),
        ([0.02, 0.021], ()),
        ([0.02, 0.02, 0.02, 0.08], (3,)),
        ([0.02, 0.08, 0.02, 0.20], (3, 1)),
        ([0.02, 0.08, 0.08, 0.02], (1, 2)),
        ([0.02], ()),
        ([], ()),
        ([0.0, 0.02, 0.02], ()),  # a rank that took no step is not known
    ],
)
def test_stragglers(seconds: list[float], slow: tuple[int, ...]) -> None:
    assert stragglers(dict(enumerate(seconds))) == slow


def test_of_64_ranks_with_noise_only_the_slow_are_named() -> None:
    draw = random.Random(0)
    seconds = {rank: draw.gauss(0.02, 0.001) for rank in range(64)} | {7: 0.05, 40: 0.09}
    assert stragglers(seconds, k=5) == (40, 7)


def test_against_numpy() -> None:
    seconds = np.abs(np.random.default_rng(1).normal(1, 0.3, 33)) + 0.1
    middle = np.quantile(seconds, 0.5, method="inverted_cdf")
    usual = np.quantile(np.abs(seconds - middle), 0.5, method="inverted_cdf")
    wanted = {rank for rank, value in enumerate(seconds) if value > middle + 2 * max(usual, 0.05 * middle)}
    assert set(stragglers(dict(enumerate(seconds.tolist())), k=2)) == wanted


def test_the_gain_is_the_sum_of_own_rates_against_now() -> None:
    assert gain({0: 0.02, 1: 0.02, 2: 0.02, 3: 0.08}, 0.08) == pytest.approx((3 * 50 + 12.5) / (4 / 0.08))
    assert gain({0: 0.05, 1: 0.05}, 0.05) == pytest.approx(1)
    assert gain({}, 0.05) == 1
