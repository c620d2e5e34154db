"""Parts add up to the target, and all members end at one time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from lightning_async.progress.appointment import Appointment, Sight, appoint, soon, weigh
from lightning_async.progress.tally import Unit


def crew(rng: random.Random) -> dict[int, Sight]:
    n = rng.randint(1, 9)
    return {r: Sight(rng.uniform(0, 50), rng.choice([0.3, 1.0, 7.0, 50.0]), rng.random() < 0.9) for r in range(n)}


@pytest.mark.parametrize("seed", range(200))
def test_parts_add_up_to_the_target_or_are_the_least_that_can_still_be_kept(seed: int) -> None:
    rng = random.Random(seed)
    sights, latency, elsewhere = crew(rng), rng.choice([0.0, 0.3]), rng.choice([0, 11])
    least = sum(sight.least(latency) for sight in sights.values()) + elsewhere
    target = least + rng.randint(-5, 400)
    parts = appoint(Unit.BATCHES, target, sights, latency, elsewhere).parts
    goes_on = any(sight.goes_on for sight in sights.values())
    assert sum(parts.values()) + elsewhere == (max(target, least) if goes_on else least)
    assert all(parts[rank] >= sight.least(latency) for rank, sight in sights.items())


@pytest.mark.parametrize("seed", range(100))
def test_each_unit_goes_to_whom_it_ends_soonest_with(seed: int) -> None:
    sights = {rank: sight for rank, sight in crew(random.Random(seed)).items() if sight.goes_on}
    if not sights:
        pytest.skip("this crew has nobody who goes on")
    parts = appoint(Unit.BATCHES, 60 * len(sights) + 500, sights, 0.0).parts
    ends = {rank: (parts[rank] - sight.count) / sight.rate for rank, sight in sights.items()}
    free = [rank for rank in sights if parts[rank] > sights[rank].least(0.0)]
    one_more = min(ends[rank] + 1 / sight.rate for rank, sight in sights.items())
    assert all(ends[rank] <= one_more + 1e-6 for rank in free), "no unit would have ended sooner with somebody else"


@pytest.mark.few(8)
@pytest.mark.parametrize("seed", range(200))
def test_parts_weigh_the_target_or_less_than_one_more_of_the_lightest(seed: int) -> None:
    rng = random.Random(seed)
    weights = rng.choice([[1, 3], [2, 3], [1, 1, 2], [4, 6, 9]])
    sights = {rank: replace(sight, weight=rng.choice(weights)) for rank, sight in crew(rng).items()}
    latency = rng.choice([0.0, 0.3])
    least = weigh({rank: sight.least(latency) for rank, sight in sights.items()}, sights)
    target = least + rng.randint(0, 400)
    parts = appoint(Unit.UPDATES, target, sights, latency).parts
    going = [sight.weight for sight in sights.values() if sight.goes_on]
    over = weigh(parts, sights) - target
    assert 0 <= over < min(going) if going else parts == {rank: sight.least(latency) for rank, sight in sights.items()}
    assert all(parts[rank] >= sight.least(latency) for rank, sight in sights.items())


def test_unlike_weights_by_hand() -> None:
    slow, fast = Sight(0, 1.0), Sight(0, 3.0, weight=3)
    assert appoint(Unit.BATCHES, 20, {0: slow, 1: fast}, 0.0).parts == {0: 2, 1: 6}
    assert appoint(Unit.BATCHES, 22, {0: slow, 1: fast}, 0.0).parts == {0: 4, 1: 6}, "three would be too many"
    assert appoint(Unit.BATCHES, 22, {0: replace(slow, goes_on=False), 1: fast}, 0.0).parts == {0: 0, 1: 8}
    assert appoint(Unit.BATCHES, 6, {0: replace(fast, weight=2), 1: fast}, 0.0).parts == {0: 2, 1: 1}, "one too many"


def test_a_list_schedule_by_hand() -> None:
    sights = {0: Sight(0, 3.0), 1: Sight(0, 1.0)}
    assert appoint(Unit.BATCHES, 12, sights, 0.0).parts == {0: 9, 1: 3}
    assert appoint(Unit.BATCHES, 13, sights, 0.0).parts == {0: 10, 1: 3}


def test_nobody_knows_any_speed() -> None:
    sights = {0: Sight(0, 0.0), 1: Sight(0, 0.0)}
    assert appoint(Unit.UPDATES, 10, sights, 0.3).parts == {0: 5, 1: 5}


def test_whoever_stands_still_is_not_counted_on() -> None:
    sights = {0: Sight(10, 1.0), 1: Sight(4, 1.0, goes_on=False)}
    assert appoint(Unit.BATCHES, 20, sights, 0.0).parts == {0: 16, 1: 4}
    assert soon(Unit.BATCHES, sights, 0.3).parts == {0: 11, 1: 4}


def test_it_travels() -> None:
    made = Appointment(Unit.SAMPLES, 12345, {0: 7, 3: 2**40})
    assert Appointment.unpack(made.pack()) == made
