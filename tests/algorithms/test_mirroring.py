"""Whatever comes in whatever order, no more than `most` arrivals are in no mirror, and nobody waits for nothing."""

from __future__ import annotations

import random

import pytest

from lightning_async.algorithms.mirroring import HOME, Mirroring


@pytest.mark.parametrize("most", [1, 2, 3, 8, 17])
def test_what_is_in_no_mirror_is_never_more(most: int) -> None:
    for seed in range(30):
        chance, shard, version, mirrored, travelling = random.Random(seed), Mirroring(), 0, 0, list[int]()
        for _ in range(200):
            if chance.random() < 0.7 and not shard.is_full(most):
                version, shard.fresh = version + 1, shard.fresh + 1
            elif travelling:
                mirrored = travelling.pop(0)
                shard.came(mirrored)
            if shard.is_due(most):
                shard.left(version)
                travelling.append(version)
            assert version - mirrored <= most
            assert travelling or not shard.is_full(most)  # who waits, waits for a mirror that is on its way


def test_an_older_mirror_than_the_one_on_its_way_brings_nothing() -> None:
    shard = Mirroring(fresh=5)
    shard.left(5)
    shard.anew(8)  # the next member is another one, and then the first again
    shard.fresh += 1
    shard.left(6)
    shard.came(5)
    assert shard.travelling == 6
    assert shard.leaving > 0
    shard.came(6)
    assert (shard.travelling, shard.leaving) == (HOME, 0)
