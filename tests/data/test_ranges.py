"""Ranges against sets of positions counted one by one, and the numbering of a rest against a list."""

from __future__ import annotations

import random

import pytest

from lightning_async.data.ranges import Range, Rest, cut, each, joined, pack_ranges, uncovered, united, unpack_ranges


def some(rng: random.Random) -> list[Range]:
    return [(rng.randrange(30), rng.randrange(1, 6)) for _ in range(rng.randrange(6))]


@pytest.mark.parametrize("seed", range(50))
def test_numbers_and_positions_of_a_rest_are_one_to_one(seed: int) -> None:
    rng = random.Random(seed)
    done = some(rng)
    left = sorted(set(range(30)) - set(each(done)))
    rest = Rest(30, done)
    assert len(rest) == len(left)
    assert [rest.position(k) for k in range(len(rest))] == left
    for first in range(len(left)):
        amount = rng.randrange(2 * len(left))
        assert each(rest.positions(first, amount)) == [left[k % len(left)] for k in range(first, first + amount)]


@pytest.mark.parametrize("seed", range(50))
def test_union_and_remainder_are_those_of_sets(seed: int) -> None:
    ranges = some(random.Random(seed))
    assert each(united(ranges)) == sorted(set(each(ranges)))
    assert each(uncovered(ranges, 3, 20)) == sorted(set(range(3, 20)) - set(each(ranges)))


def test_whole_order_is_its_own_rest() -> None:
    assert list(Rest(10**9).positions(7, 5)) == [(7, 5)]
    assert Rest(10**9).position(10**9 - 1) == 10**9 - 1


def test_what_is_done_outside_of_the_span_does_not_count() -> None:
    assert len(Rest(8, [(6, 100), (200, 1)])) == 6


def test_cut_goes_over_the_ends_of_ranges() -> None:
    assert list(cut([(0, 4), (10, 4)], 3, 3)) == [(3, 1), (10, 2)]
    assert not list(cut([(0, 4)], 0, 0))


def test_joined_keeps_the_order() -> None:
    assert joined([(4, 2), (6, 1), (0, 4), (4, 0)]) == [(4, 3), (0, 4)]


def test_ranges_survive_the_board() -> None:
    ranges = ((5, 4), (2**40, 5))
    assert unpack_ranges(pack_ranges(ranges)) == ranges
