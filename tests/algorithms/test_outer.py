"""The outer rules: what is added up is what moves, and delayed Nesterov in rounds is Nesterov with the mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_async.algorithms.outer import Rule, outer_rule

SIZE, N = 32, 4
ARRIVALS = torch.randn(5 * N, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def moved(
    outer: Rule | None, arrivals: Tensor, *, lr: float = 1.0, momentum: float = 0.0, gamma: float = 1 / N
) -> Tensor:
    weights = torch.zeros(SIZE, dtype=torch.float64)
    rule = outer_rule(outer, lr=lr, momentum=momentum)(weights)
    for arrival in arrivals:
        rule.arrive(weights, arrival, gamma, N)
    return weights


def test_sum_moves_by_exactly_what_arrived() -> None:
    torch.testing.assert_close(moved(None, ARRIVALS), ARRIVALS.sum(0) / N)
    torch.testing.assert_close(moved("sum", ARRIVALS, lr=0.5), ARRIVALS.sum(0) / N / 2)


def test_delayed_nesterov_is_synchronous_nesterov_after_every_round() -> None:
    """Against a twin in NumPy that sees the mean of each round."""
    weights, buffer = np.zeros(SIZE), np.zeros(SIZE)
    for mean in ARRIVALS.view(5, N, SIZE).mean(1).numpy():
        buffer = 0.9 * buffer + mean
        weights = weights + 0.7 * (mean + 0.9 * buffer)
    got = moved("delayed_nesterov", ARRIVALS, lr=0.7, momentum=0.9)
    np.testing.assert_allclose(got.numpy(), weights, rtol=1e-12)
    means = ARRIVALS.view(5, N, SIZE).mean(1)
    torch.testing.assert_close(moved("nesterov", means, lr=0.7, momentum=0.9, gamma=1.0), got)


def test_between_two_rounds_there_is_no_momentum() -> None:
    part = moved("delayed_nesterov", ARRIVALS[: N - 1], momentum=0.9)
    torch.testing.assert_close(part, ARRIVALS[: N - 1].sum(0) / N)


def test_with_momentum_it_is_delayed_by_default() -> None:
    assert torch.equal(moved(None, ARRIVALS, momentum=0.9), moved("delayed_nesterov", ARRIVALS, momentum=0.9))


WRONG = [
    ({"outer": "adam"}, "`outer` must be one of 'sum', 'nesterov', 'delayed_nesterov', got 'adam'"),
    ({"lr": 0.0}, "`outer_lr` must be a number above 0, got 0.0"),
    ({"momentum": 1.0}, "`outer_momentum` must be at least 0 and below 1, got 1.0"),
    ({"outer": "sum", "momentum": 0.5}, "`outer_momentum` has no meaning with outer='sum', got 0.5"),
    ({"outer": "nesterov"}, "outer='nesterov' needs an `outer_momentum` above 0, got 0.0"),
]


@pytest.mark.parametrize(("knobs", "sentence"), WRONG)
def test_a_wrong_knob_says_what_is_wrong(knobs: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        outer_rule(**{"outer": None, "lr": 1.0, "momentum": 0.0, **knobs})  # type: ignore[arg-type]
