"""The law of a part: what the members get sums to it exactly, and all end within one sample's time of each other."""

from __future__ import annotations

import random

import pytest

from lightning_async.data.allotment import FEW, level, next_part, top_up, worthwhile


def some(seed: int) -> tuple[random.Random, int, list[int], list[float]]:
    """An amount, what members have, and their seconds a sample, over a factor of a hundred."""
    rng = random.Random(seed)
    n = rng.randint(1, 20)
    have = [rng.choice([0, rng.randint(0, 500)]) for _ in range(n)]
    return rng, rng.randint(0, 3000), have, [10 ** rng.uniform(-2, 0) for _ in range(n)]


def test_a_part_is_given_out_exactly_and_all_end_together() -> None:
    for seed in range(500):
        _, amount, have, seconds = some(seed)
        sizes = top_up(amount, have, seconds)
        assert sum(sizes) == amount, f"seed {seed}"
        assert min(sizes) >= 0, f"seed {seed}"
        ends = [(h + n) * s for h, n, s in zip(have, sizes, seconds, strict=True)]
        soonest = min(end + s for end, s in zip(ends, seconds, strict=True))
        late = [end for end, n in zip(ends, sizes, strict=True) if n]
        assert all(end <= soonest * (1 + 1e-9) for end in late), f"seed {seed}: one sample less would end sooner"


def test_no_other_way_to_give_out_a_part_ends_sooner() -> None:
    for seed in range(200):
        rng, _, have, seconds = some(seed)
        amount = rng.randint(1, 40)
        twin = list(have)
        for _ in range(amount):  # a list schedule, sample by sample
            twin[min(range(len(twin)), key=lambda k: (twin[k] + 1) * seconds[k])] += 1
        sizes = top_up(amount, have, seconds)
        got = [h + n for h, n in zip(have, sizes, strict=True)]

        def end(of: list[int], have: list[int] = have, seconds: list[float] = seconds) -> float:
            return max((t * s for t, h, s in zip(of, have, seconds, strict=True) if t > h), default=0.0)

        assert end(got) == pytest.approx(end(twin)), f"seed {seed}"


def test_where_nobody_has_too_much_it_is_the_papers_formula() -> None:
    for seed in range(200):
        rng, _, _, seconds = some(seed)
        total, a = 1000, rng.randint(2, 10)
        have = top_up(total * (a - 1), [0] * len(seconds), seconds)
        common = total * a / sum(1 / s for s in seconds)  # T*
        sizes = top_up(total, have, seconds)
        for h, n, s in zip(have, sizes, seconds, strict=True):
            assert abs((h + n) * s - common) <= max(seconds), f"seed {seed}"


def test_equal_speeds_get_equal_shares() -> None:
    assert top_up(100, [0] * 4, [0.3] * 4) == [25] * 4
    assert sorted(top_up(101, [7] * 4, [0.3] * 4)) == [25, 25, 25, 26]


def test_shares_go_to_the_speeds() -> None:
    speeds = [1.0, 0.5, 2.0, 0.1]
    for total in (360, 3600, 36000):
        sizes = top_up(total, [0] * 4, [1 / s for s in speeds])
        assert all(abs(n - total * s / 3.6) <= 1 for n, s in zip(sizes, speeds, strict=True))


def test_who_has_more_than_its_part_gets_nothing_and_gives_nothing_away() -> None:
    assert top_up(30, [100, 0, 0], [1.0, 1.0, 1.0]) == [0, 15, 15]
    assert level(30, [100, 0, 0], [1.0, 1.0, 1.0]) == 15


def test_each_gets_the_least_whatever_its_speed() -> None:
    for seed in range(200):
        rng, amount, have, seconds = some(seed)
        least = rng.randint(0, 20)
        sizes = top_up(amount, have, seconds, least=least)
        assert sum(sizes) == amount
        assert min(sizes) >= min(least, amount // len(have))


def test_units_are_not_broken_but_for_one() -> None:
    for seed in range(200):
        rng, amount, have, seconds = some(seed)
        unit = rng.randint(1, 16)
        sizes = top_up(amount, have, seconds, unit=unit)
        assert sum(sizes) == amount
        assert sum(n % unit != 0 for n in sizes) <= 1


@pytest.mark.parametrize("unit", [1, 8])
def test_parts_are_equal_and_make_the_whole(unit: int) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        total, parts = unit * rng.randint(0, 3000), rng.randint(1, 30)
        sizes, given = [], 0
        while n := next_part(given, total, parts, unit=unit):
            sizes.append(n)
            given += n
        assert given == total
        assert len(sizes) <= parts
        assert all(n % unit == 0 and abs(n - total / parts) <= 2 * unit for n in sizes) or total < parts * unit


def test_parts_that_would_be_too_small_are_made_fewer() -> None:
    assert worthwhile(10, 10_000, members=4, batch=8) == 10
    assert worthwhile(10, FEW * 4 * 8 * 3 + 5, members=4, batch=8) == 3
    assert worthwhile(10, 5, members=4, batch=8) == 1


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_seconds_are_checked(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds a sample must be above 0 and finite"):
        top_up(10, [0, 0], [1.0, seconds])
