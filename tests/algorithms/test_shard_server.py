"""One shard: W moves by exactly the sum of gamma * Q * correction, and versions count arrivals."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.async_global import AsyncGlobal
from lightning_async.algorithms.outer import outer_rule
from lightning_async.algorithms.shard_server import OnLate, Rules, ShardServer, version_of
from lightning_async.algorithms.shards import LAST, MILLION, NOT_FINITE, PUSH
from lightning_async.algorithms.weighting import Attenuation, bound_among, law
from lightning_async.arrival import Arrival
from lightning_async.fresh import Fresh
from lightning_async.transport.mail import Letter, Message

SIZE = 48


def server(
    n: int = 4,
    *,
    attenuation: Attenuation = "none",
    max_delay: int | None = None,
    on_late: OnLate = "shrink",
    momentum: float = 0.0,
) -> ShardServer:
    rules = Rules(attenuation, law(attenuation), max_delay, on_late, outer_rule(None, lr=1.0, momentum=momentum))
    return ShardServer(rules, torch.zeros(SIZE), tuple(range(n)))


def letter(peer: int, base: int, *, step: int = 1, weight: int = UNIT, kind: int = PUSH) -> Letter:
    return Letter(peer, step, Message(kind, step=step, version=base, echo=1000 + peer, samples=8, weight=weight), 0.0)


def test_a_law_may_ask_how_a_push_goes_with_what_was_merged_lately() -> None:
    shard, answers = server(2), list[float | None]()

    def shrink(arrival: Arrival, correction: Tensor, fresh: Fresh) -> float:
        answers.append(fresh())
        return 1.0

    shard.shrink = lambda: shrink
    way, aside = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(1))
    aside -= way * (way @ aside) / (way @ way)
    for step, (peer, correction) in enumerate([(0, way), (1, -0.1 * way), (0, way), (1, 0.1 * way), (1, aside)], 1):
        shard.arrive(letter(peer, 0, step=step), correction)
    assert answers[0] is None  # from here on it is kept
    assert answers[1:] == pytest.approx([-1, 1, 1, 0], abs=1e-5)


def random_arrivals(n: int, count: int) -> list[tuple[Letter, Tensor]]:
    chance, bases = random.Random(n), [0] * n
    found = []
    for version in range(count):
        peer = chance.randrange(n)
        weight = round(UNIT * chance.choice([1, 8, 0.37]))
        found.append((letter(peer, bases[peer], step=version + 1, weight=weight), torch.randn(SIZE)))
        bases[peer] = version + 1
    return found


@pytest.mark.parametrize("n", [1, 4, 9])
@pytest.mark.parametrize("attenuation", ["poly", "exp", "hinge", "none", "paper"])
def test_it_moves_by_the_sum_of_gamma_q_and_correction(attenuation: Attenuation, n: int) -> None:
    """Against a twin in NumPy."""
    shard = server(n, attenuation=attenuation)
    weights, last, bases = np.zeros(SIZE), {}, [0.0] * n
    for version, (push, correction) in enumerate(random_arrivals(n, 60)):
        base, worth = push.message.version, push.message.weight / UNIT
        if attenuation == "paper":
            shares = [math.exp(k / version) if version else 1.0 for k in bases]
            gamma = worth * shares[push.peer] / sum(shares)
        else:
            excess = max(0, version - base - 2 * (n - 1)) / n
            worth *= {
                "poly": (1 + excess) ** -0.5,
                "exp": math.exp(-0.5 * excess),
                "hinge": 1.0 if excess <= 10 else 1 / (excess - 9),
                "none": 1.0,
            }[attenuation]
            last[push.peer] = worth
            gamma = worth / (n * np.mean(list(last.values())))
        weights = weights + gamma * correction.double().numpy()
        bases[push.peer] = version + 1
        assert shard.arrive(push, correction) == MILLION
        assert shard.version == version + 1
    np.testing.assert_allclose(shard.weights.numpy(), weights, rtol=1e-5, atol=1e-5)


def test_all_from_one_version_delivered_one_after_another_are_their_mean() -> None:
    """AGWU with fresh members, Q = 1 and gamma = 1/m is SGWU: the update is additive."""
    shard, corrections = server(5), torch.randn(5, SIZE)
    for peer in range(5):
        shard.arrive(letter(peer, 0), corrections[peer])
    torch.testing.assert_close(shard.weights, corrections.mean(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_moves_nothing_is_counted_and_answered(bad: float) -> None:
    shard, correction = server(momentum=0.9), torch.zeros(SIZE)
    correction[17] = bad
    assert shard.arrive(letter(1, 0), correction) == NOT_FINITE
    assert torch.equal(shard.weights, torch.zeros(SIZE))
    assert (shard.version, shard.counts["refused"], shard.counts["folded"]) == (1, 1, 0)
    assert all(torch.equal(tensor, torch.zeros(SIZE)) for tensor in shard.outer.tensors)


def test_what_is_late_is_shrunk_or_dropped_and_counted() -> None:
    for on_late, counted in (("shrink", 0.5), ("drop", 0.0)):
        shard = server(2, max_delay=4, on_late=on_late)  # type: ignore[arg-type]
        for step in range(12):
            assert shard.arrive(letter(0, step), torch.zeros(SIZE)) == MILLION
        # 12 versions late, 2 of them nobody's fault: an excess of 10, where 4 are in time: (4 + 2) / (10 + 2)
        assert shard.arrive(letter(1, 0), torch.ones(SIZE)) == round(counted * MILLION)
        torch.testing.assert_close(shard.weights, torch.full((SIZE,), counted / 2))
        assert shard.counts["dropped" if on_late == "drop" else "shrunk"] == 1


@pytest.mark.parametrize("n", [2, 10, 256])
def test_by_default_ten_rounds_too_late_count_in_full_at_any_number_of_members(n: int) -> None:
    """Also 12 times slower than all others, whose pushes are versions: the law sees rounds, and so must the bound."""
    shard = ShardServer(AsyncGlobal().rules, torch.zeros(SIZE), tuple(range(n)))
    shard.version = 2 * (n - 1) + 10 * n
    assert shard.arrive(letter(1, 0), torch.ones(SIZE)) == MILLION
    shard.version = 2 * (n - 1) + bound_among(n, "auto")
    assert shard.arrive(letter(1, 0), torch.ones(SIZE)) == MILLION  # of what is late nothing is taken twice
    assert shard.arrive(letter(1, 0), torch.ones(SIZE)) < MILLION


def test_fast_members_wait_for_the_oldest_and_never_the_oldest() -> None:
    shard = server(3, max_delay=2, on_late="wait")
    bound = 2 + 2  # and n - 1
    for step in range(bound):
        assert not shard.must_wait(step)
        shard.arrive(letter(0, step), torch.zeros(SIZE))
    assert shard.must_wait(bound)
    assert not shard.must_wait(0)
    shard.arrive(letter(1, 0), torch.zeros(SIZE))
    assert shard.must_wait(bound)
    shard.arrive(letter(2, 0, kind=LAST), torch.zeros(SIZE), last=True)
    assert not shard.must_wait(bound)  # who waits for a meeting holds nobody up


def test_the_dead_hold_nobody_up_and_count_for_nothing() -> None:
    shard = server(3, max_delay=1, on_late="wait")
    for step in range(3):
        shard.arrive(letter(0, step), torch.zeros(SIZE))
    assert shard.must_wait(3)
    shard.hear((0,))
    assert not shard.must_wait(3)
    shard.arrive(letter(0, 3), torch.ones(SIZE))
    torch.testing.assert_close(shard.weights, torch.ones(SIZE))


def test_a_push_is_known_until_the_members_next() -> None:
    shard = server()
    shard.arrive(letter(2, 0, step=7), torch.zeros(SIZE))
    assert [shard.newest(peer) for peer in (1, 2)] == [0, 7]
    shard.orphaned = 5  # begun anew from somebody's weights: what is in them of whom is not known
    assert [shard.newest(peer) for peer in (1, 2)] == [-1, 7]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_image_is_all_that_it_is(momentum: float) -> None:
    """Whoever becomes what an image says goes on to the bit."""
    shard, other = server(attenuation="poly", momentum=momentum), server(attenuation="poly", momentum=momentum)
    arrivals = random_arrivals(4, 60)
    for push, correction in arrivals[:33]:
        shard.arrive(push, correction, last=push.peer == 3)
    image = shard.image()
    assert version_of(image) == 33
    other.become(image)
    for push, correction in arrivals[33:]:
        assert shard.arrive(push, correction) == other.arrive(push, correction)
    assert torch.equal(shard.weights, other.weights)
    assert torch.equal(shard.image(), other.image())


def test_a_shrink_is_asked_with_the_delay() -> None:
    shard, asked = server(2), []
    shard.shrink = lambda: lambda arrival, correction, fresh: asked.append(arrival.delay) or 0.25
    for step in range(3):
        shard.arrive(letter(0, 0, step=step), torch.ones(SIZE))
    assert asked == [0, 1, 2]
    torch.testing.assert_close(shard.weights, torch.full((SIZE,), 3 * 0.25 / 2))
    assert shard.counts["shrunk"] == 3
