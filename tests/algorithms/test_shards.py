"""Shards cover the vector once, begin at multiples of 16, and have owners all over the members."""

from __future__ import annotations

import itertools

import pytest

from lightning_async.algorithms.shards import cut, first_owner, place, shard_of


@pytest.mark.parametrize("numel", [1, 15, 16, 17, 100, 1024, 25_000_003])
@pytest.mark.parametrize("shards", [1, 2, 3, 7, 8, 300])
def test_they_cover_the_vector_once_and_are_cut_at_multiples_of_16(numel: int, shards: int) -> None:
    parts = cut(numel, shards)
    assert parts[0].begin == 0
    assert parts[-1].end == numel
    assert all(a.end == b.begin for a, b in itertools.pairwise(parts))
    assert all(part.begin % 16 == 0 and part.end > part.begin for part in parts)
    assert [part.number for part in parts] == list(range(len(parts)))
    assert len(parts) == min(shards, -(-numel // 16))
    sizes = [part.end - part.begin for part in parts]
    assert max(sizes) - min(sizes) < 32


def test_no_member_owns_two_where_there_are_enough() -> None:
    for world in (1, 2, 5, 8, 256):
        shards = min(8, world)
        owners = [first_owner(b, shards, world) for b in range(shards)]
        assert len(set(owners)) == shards
        assert all(0 <= owner < world for owner in owners)


def test_a_place_tells_its_shard() -> None:
    assert [shard_of(place(b, 2**20 + 3)) for b in (0, 5, 299)] == [0, 5, 299]
    assert place(5, 4) > place(299, 3)
