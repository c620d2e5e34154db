"""Compensation changes nothing where nothing is late, and is what its equations say where something is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from lightning_async.algorithms.compensation import STRENGTHS, compensation
from lightning_async.algorithms.server_groups import Groups
from lightning_async.algorithms.server_step import ServerStep
from tests.algorithms.turn_world import LR, SIZE, TARGETS, TOKENS, consensus, go, pushes, sgd

MAKERS = {"sgd": sgd(), "momentum": sgd(momentum=0.9), "adamw": lambda p: optim.AdamW(p, 0.01)}


@pytest.mark.parametrize("how", ["lr", "dc"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_where_nothing_is_late_nothing_changes_to_the_bit(make: Any, how: Any) -> None:
    plain, compensated = (consensus(go([1], make_optimizer=make, **knobs)[1]) for knobs in ({}, {"compensation": how}))
    assert torch.equal(plain, compensated)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("how", ["lr", "dc"])
def test_with_a_strength_of_0_nothing_changes_to_the_bit(how: Any, token: Any) -> None:
    knobs: dict[str, Any] = {"token": token, "make_optimizer": sgd(momentum=0.9)}
    plain = consensus(go([1, 1, 1, 16], **knobs)[1])
    assert torch.equal(plain, consensus(go([1, 1, 1, 16], compensation=how, compensation_strength=0, **knobs)[1]))


def test_under_strict_nothing_is_later_than_in_a_healthy_run() -> None:
    plain, slower = (consensus(go([1, 1, 4], token="strict", compensation=how)[1]) for how in ("none", "lr"))
    assert torch.equal(plain, slower)


@pytest.mark.parametrize("strength", [None, 3.0])
def test_delay_compensated_a_twin_in_numpy_makes_the_same_weights(strength: float | None) -> None:
    n, factor = 4, STRENGTHS["dc"] if strength is None else strength
    knobs: dict[str, Any] = {"compensation": "dc", "compensation_strength": strength}
    _, trained = go([1, 1.5, 3, 2], token="strict", shards=1, **knobs)
    weights = [np.zeros(SIZE)]
    for rank, push in pushes(trained):
        then, now = weights[push.base], weights[push.folded]
        mean = then - TARGETS[rank].numpy()
        weights.append(now - LR / n * push.samples * (mean + factor * mean * mean * (now - then)))
    np.testing.assert_allclose(consensus(trained).numpy(), weights[-1], rtol=1e-9)


@pytest.mark.parametrize("push", ["gradient", "delta"])
@pytest.mark.parametrize("strength", [None, 2.0])
def test_a_late_push_moves_by_a_shorter_step(strength: float | None, push: Any) -> None:
    n, power = 4, STRENGTHS["lr"] if strength is None else strength
    knobs: dict[str, Any] = {"compensation": "lr", "compensation_strength": strength, "push": push}
    _, trained = go([1, 1, 1, 30], seconds=4.0, counting=True, shards=1, make_optimizer=sgd(1.0), **knobs)
    most = 0.0
    for rank, one in trained.items():
        excess = [max(0, a.delay - 2 * (n - 1)) / n for a in one.arrivals]
        most = max(most, *excess)
        moved = sum(a.samples * (1 + e) ** -power for a, e in zip(one.arrivals, excess, strict=True)) / n
        assert consensus(trained)[rank].item() == pytest.approx(moved)
    assert most > 1


def test_adam_takes_a_shorter_step_and_would_not_see_a_smaller_gradient() -> None:
    def moved(gamma: float, pace: float) -> float:
        whole, weights = nn.Parameter(torch.zeros(16)), torch.zeros(16)
        rule = ServerStep(weights, Groups(optim.Adam([whole], 0.01), [(whole, 0)]))
        rule.arrive(weights, torch.ones(16), gamma, 1, pace=pace)
        return weights[0].item()

    assert moved(0.1, 1.0) == pytest.approx(moved(1.0, 1.0))
    assert moved(1.0, 0.1) == pytest.approx(0.1 * moved(1.0, 1.0))


def test_a_square_that_is_beyond_all_numbers_leaves_the_gradient_as_it_is() -> None:
    late, huge = compensation("dc"), torch.tensor([1e30, 1.0])
    assert torch.equal(late.today(huge, 1, torch.zeros(2), torch.ones(2)), huge)


def test_an_heir_compensates_for_what_it_has_seen_itself() -> None:
    def faults(cluster: Any) -> None:
        cluster.kill(0, at=0.5)

    knobs: dict[str, Any] = {"compensation": "dc", "compensation_strength": 1.0, "mirror_every": 1}
    _, trained = go([1, 1, 2, 1], seconds=6.0, shards=1, faults=faults, **knobs)
    assert set(trained) == {1, 2, 3}
    torch.testing.assert_close(consensus(trained), TARGETS[1:4].mean(0), rtol=0, atol=0.4)
