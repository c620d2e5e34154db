"""What is not late counts in full, what is later never counts more, and nothing is thrown away or reversed."""

from __future__ import annotations

import json
import math
import random
from typing import Any, get_args

import pytest
import torch

from lightning_async.algorithms.gossip import HEALTHY
from lightning_async.algorithms.shrink import (
    MARGIN,
    Alignment,
    Law,
    LawName,
    Relative,
    Stability,
    law,
    steadiness,
)
from lightning_async.arrival import Arrival
from lightning_async.fresh import Fresh
from tests.algorithms.one_hot import Outcome, run

LAWS = get_args(LawName)
DELAYS = [0, 1, 2, 3, 5, 8, 20, 100, 1000, 10**6]


def stirred(name: LawName, seed: int) -> Law:
    """A law with some past."""
    draw = random.Random(seed)
    made = law(
        name, beta=draw.uniform(0.1, 1), rate=draw.uniform(0, 2), power=draw.uniform(0, 2), knee=draw.uniform(0, 9)
    )
    for _ in range(200):
        made.factor(draw.expovariate(0.2), lambda: draw.uniform(-1, 0.5) if draw.random() < 0.9 else None)
        made.observe(draw.choice([1.0, 2.0, draw.uniform(0, 50), math.nan if draw.random() < 0.02 else 3.0]))
        if isinstance(made, Stability) and seed % 2:
            made.look(draw.gauss(1, 2), draw.random(), lr=draw.random(), momentum=draw.uniform(0, 0.95))
    return made


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", LAWS)
def test_full_at_0_never_rising_and_in_0_to_1(name: LawName, seed: int) -> None:
    made = stirred(name, seed)
    state = made.state_dict()
    factors = []
    for delay in DELAYS:
        made.load_state_dict(state)  # a law is one at a state: what is asked moves the state
        factors.append(made.factor(delay))
    assert factors[0] == 1
    assert all(0 < factor <= 1 for factor in factors)
    assert factors == sorted(factors, reverse=True)


def shrunk_by(made: Law, **knobs: Any) -> Outcome:
    def factor(arrival: Arrival, correction: torch.Tensor, fresh: Fresh) -> float:
        return made.factor(max(0, arrival.delay - HEALTHY), fresh)

    return run([1, 1, 4.0], shrink=factor, cluster={"latency": 0.05, "jitter": 1.0, "seed": 3}, **knobs)


@pytest.mark.parametrize("mode", ["pairwise", "push_sum"])
def test_constant_1_changes_nothing_to_the_bit(mode: str) -> None:
    one = shrunk_by(law("constant", beta=1.0), mode=mode)
    none = run([1, 1, 4.0], cluster={"latency": 0.05, "jitter": 1.0, "seed": 3}, mode=mode)
    assert torch.equal(one.consensus, none.consensus)
    for mine, theirs in zip(one.replicas, none.replicas, strict=True):
        assert torch.equal(mine.weights(), theirs.weights())


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("mode", ["pairwise", "push_sum"])
def test_a_healthy_run_is_never_shrunk(mode: str, n: int) -> None:
    """Equal members on a network that is quicker than their steps: no delay is over the healthy one."""
    outcome = run([1.0] * n, mode=mode, cluster={"latency": 0.004, "jitter": 0.5, "seed": n})
    delays = [a.delay for trained in outcome.trained.values() for a in trained.arrivals]
    assert delays
    assert max(delays) <= HEALTHY


def test_late_contributions_are_shrunk() -> None:
    outcome = run(
        [1, 1, 8.0],
        mode="pairwise",
        shrink=lambda arrival, correction, fresh: law("inverse").factor(arrival.delay),
        cluster={"latency": 0.1},
    )
    factors = {a.delay: a.factor for trained in outcome.trained.values() for a in trained.arrivals}
    assert max(factors) > 3
    for delay, factor in factors.items():
        assert factor == pytest.approx(1 / (1 + 0.1 * delay))


@pytest.mark.parametrize(
    ("name", "knobs", "at_10"),
    [
        ("constant", {"beta": 0.9}, 0.9**10),
        ("inverse", {"rate": 0.2}, 1 / 3),
        ("poly", {"power": 0.5}, 11**-0.5),
        ("exp", {"rate": 0.1}, math.exp(-1)),
        ("hinge", {"rate": 0.5, "knee": 6}, 1 / 3),
        ("hinge", {"rate": 0.5, "knee": 12}, 1.0),
    ],
)
def test_the_fixed_laws_are_what_they_say(name: LawName, knobs: dict[str, float], at_10: float) -> None:
    assert law(name, **knobs).factor(10) == pytest.approx(at_10)


def test_relative_judges_by_what_is_usual() -> None:
    made = Relative()
    for _ in range(10):
        assert [made.factor(delay) for delay in (4, 5, 6, 5)] == [1, 1, 1, 1]
    assert made.factor(made.usual) == 1
    assert made.factor(2 * made.usual + 1) == pytest.approx(0.5)
    for _ in range(300):
        made.factor(40)
    assert made.factor(40) == 1  # what all have become is usual


def test_alignment_shrinks_what_goes_against_the_fresh_and_holds_still_in_noise() -> None:
    made = Alignment()
    assert [made.factor(3, lambda: 1.0) for _ in range(20)] == [1.0] * 20
    fell = [made.factor(3, lambda: -1.0) for _ in range(40)]
    assert fell == sorted(fell, reverse=True)
    assert fell[-1] == made.level == 0.05
    for _ in range(40):
        made.factor(3, lambda: 1.0)
    assert made.level == 1
    noise = random.Random(0)
    assert {made.factor(3, lambda: noise.gauss(0, 0.1)) for _ in range(200)} == {1.0}
    assert made.factor(0, lambda: -1.0) == 1
    assert [made.factor(3, lambda: None) for _ in range(9)] == [1.0] * 9


def test_alignment_has_hysteresis() -> None:
    """The way back is another one: what has once gone against the fresh is trusted again when it no longer does."""
    made, levels = Alignment(memory=0.0), dict[tuple[str, float], float]()
    cosines = [round(0.02 * k, 2) for k in range(2, -26, -1)]
    for way, at in (("down", cosines), ("up", cosines[::-1])):
        levels |= {(way, x): made.factor(3, lambda x=x: x) for x in at}  # type: ignore[misc]
    assert levels["down", -0.04] == 1 > levels["up", -0.04]
    assert levels["up", 0.0] == 1
    assert all(levels["up", x] <= levels["down", x] + 1e-9 for x in cosines)
    still = made.factor(3, lambda: -0.3)
    assert {made.factor(3, lambda x=x: x) for x in (-0.27, -0.33, -0.26, -0.34)} == {still}  # type: ignore[misc]


def test_stability_rises_with_the_loss_and_relaxes() -> None:
    made, noise = Stability(), random.Random(1)
    for step in range(1500):
        made.observe(3 * math.exp(-step / 500) + 0.05 * noise.random())
    assert made.pressure < 0.05
    for step in range(60):
        made.observe(1 + step / 10)
    risen = made.pressure
    assert risen > 1
    assert made.factor(6) < 0.2
    for _ in range(1500):
        made.observe(1 + 0.05 * noise.random())
    assert made.pressure < 0.2 * risen
    made.observe(math.inf)
    assert made.pressure >= 1


def late_descent(step: float, delay: int, momentum: float, steps: int = 4000) -> list[float]:
    """The last places of SGD on a parabola of curvature 1, from 1, if its gradients come so late."""
    past, velocity, places = [1.0] * (delay + 1), 0.0, [1.0]
    while len(places) < steps and abs(places[-1]) < 1e6:
        velocity = momentum * velocity + past[0]
        past = [*past[1:], past[-1] - step * velocity]
        places.append(past[-1])
    return places


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("delay", [0, 1, 2, 3, 5, 9])
def test_steadiness_is_the_largest_step_that_converges(delay: int, momentum: float) -> None:
    largest = steadiness(delay, momentum)
    assert max(map(abs, late_descent(0.97 * largest, delay, momentum)[-100:])) < 0.1
    assert max(map(abs, late_descent(1.03 * largest, delay, momentum)[-100:])) > 1.0
    if momentum == 0:
        assert largest == pytest.approx(2 * math.sin(math.pi / (4 * delay + 2)))


@pytest.mark.parametrize("delay", [1, 3, 5, 9, 30])
def test_a_quarter_of_it_does_not_swing(delay: int) -> None:
    """On the other side of the bottom it is never farther than a hundredth of where it began."""
    assert min(late_descent(steadiness(delay) / MARGIN, delay, 0.0)) > -0.01
    assert min(late_descent(steadiness(delay) / 2, delay, 0.0)) < -0.05


def test_stability_sees_which_steps_are_too_large_for_their_delay() -> None:
    made = Stability()
    for _ in range(10):
        made.look(7.0, 1.0, lr=0.01, momentum=0.0)
    assert [made.factor(delay) for delay in (0, 1, 3)] == [1, 1, 1]
    for _ in range(10):
        made.look(7.0, 1.0, lr=0.1, momentum=0.0)
    assert made.factor(3) == pytest.approx(steadiness(3) / MARGIN / 0.7)
    assert made.factor(3) == made.further(2, 3) > made.factor(5)
    for _ in range(10):
        made.look(-1.0, 1.0, lr=0.1, momentum=0.0)
    made.look(math.inf, 1.0, lr=0.1, momentum=0.0)
    assert made.factor(3) == pytest.approx(steadiness(3) / MARGIN / 0.1 / (130 / 30))


def test_a_momentum_that_changes_at_every_step_is_not_looked_up_each_time() -> None:
    made = Stability()
    for _ in range(10):
        made.look(7.0, 1.0, lr=0.5, momentum=0.9)
    steadiness.cache_clear()
    for step in range(5000):
        momentum = 0.85 + 0.1 * step / 5000
        made.look(7.0, 1.0, lr=0.5, momentum=momentum)
        found = made.factor(3)
    assert found == pytest.approx(steadiness(3, momentum) / MARGIN / 3.5, rel=0.01)
    assert steadiness.cache_info().currsize <= 1001
    made.look(7.0, 1.0, lr=0.5, momentum=0.9999)
    assert made.factor(3) == pytest.approx(steadiness(3, 0.9999) / MARGIN / 3.5, rel=0.01)  # far from that of 1


def test_gradients_that_jump_raise_the_shrink_and_are_forgotten() -> None:
    made = Stability()
    for _ in range(200):
        made.look(1.0, 1.0, lr=0.05, momentum=0.0)
    calm = made.factor(3)
    for _ in range(5):
        made.look(100.0, 1.0, lr=0.05, momentum=0.0)
    assert made.factor(3) < calm / 2
    for _ in range(700):
        made.look(1.0, 1.0, lr=0.05, momentum=0.0)
    assert made.factor(3) > 0.9 * calm


@pytest.mark.parametrize("name", LAWS)
def test_goes_on_from_its_state(name: LawName) -> None:
    made, again = stirred(name, 5), law(name, beta=0.3)
    if name in ("constant", "inverse", "poly", "exp", "hinge"):
        assert made.state_dict() == {}
        return
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    for delay in (0, 3, 50):
        made.observe(2.0)
        again.observe(2.0)
        assert made.factor(delay) == again.factor(delay)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"name": "linear"}, "`law` must be one of constant, inverse, .*, got 'linear'"),
        ({"name": "constant", "beta": 0.0}, r"`beta` must be above 0 and at most 1 \(1: nothing is shrunk\), got 0.0"),
        ({"name": "constant", "beta": 1.5}, "`beta` must be above 0 and at most 1"),
        ({"name": "exp", "rate": -1}, "`rate` must be at least 0, got -1"),
        ({"name": "poly", "power": math.nan}, "`power` must be at least 0, got nan"),
        ({"name": "hinge", "knee": -2}, "`knee` must be at least 0, got -2"),
    ],
)
def test_wrong_laws(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        law(**knobs)
