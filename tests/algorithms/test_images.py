"""Images of shards: packed and unpacked they are the same, and cut anew nothing of the outer momentum is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_async.algorithms.images import bundle, gathered, recut, unbundle
from lightning_async.algorithms.outer import outer_rule
from lightning_async.algorithms.shard_server import Rules, ShardServer
from lightning_async.algorithms.shards import cut
from lightning_async.algorithms.weighting import law

SIZE = 160
RULES = Rules("none", law("none"), None, "shrink", outer_rule(None, lr=1.0, momentum=0.9))
WEIGHTS = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
MOMENTS = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(2))


def server(weights: Tensor) -> ShardServer:
    return ShardServer(RULES, weights, (0, 1, 2))


def images(count: int) -> dict[int, Tensor]:
    """Of a whole vector in so many shards, all at version 7."""
    found = {}
    for shard in cut(SIZE, count):
        one = server(WEIGHTS[shard.part].clone())
        one.version = 7
        one.pushed = {1: 40}
        for tensor, whole in zip(one.outer.tensors, MOMENTS, strict=True):
            tensor.copy_(whole[shard.part])
        found[shard.number] = one.image()
    return found


def test_packed_and_unpacked_they_are_the_same() -> None:
    before = images(3)
    after = unbundle(bundle(before))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[number], after[number]) for number in before)
    assert unbundle(bundle({})) == {}


@pytest.mark.parametrize("new", [1, 2, 5, 8])
@pytest.mark.parametrize("old", [1, 3, 8])
def test_cut_anew_nothing_of_the_momentum_is_lost(old: int, new: int) -> None:
    before = images(old)
    bundles = [bundle({number: image}) for number, image in before.items()]
    shards = cut(SIZE, new)
    after = recut(gathered(bundles), old, WEIGHTS, shards, server)
    for shard in shards:
        one = server(torch.zeros(shard.end - shard.begin))
        one.become(after[shard.number])
        assert torch.equal(one.weights, WEIGHTS[shard.part])
        assert all(torch.equal(a, b[shard.part]) for a, b in zip(one.outer.tensors, MOMENTS, strict=True))
        assert (one.version, one.pushed) == (7, {})


@pytest.mark.parametrize("missing", range(3))
def test_where_a_shard_is_missing_its_elements_alone_begin_anew(missing: int) -> None:
    before, (gone, whole) = images(3), (cut(SIZE, 3)[missing], cut(SIZE, 1))
    del before[missing]
    after = recut(gathered([bundle(before)]), 3, WEIGHTS, whole, server)
    one = server(torch.zeros(SIZE))
    one.become(after[0])
    known = MOMENTS.clone()
    known[:, gone.part] = 0
    assert torch.equal(one.weights, WEIGHTS)
    assert all(torch.equal(a, b) for a, b in zip(one.outer.tensors, known, strict=True))


def test_of_two_images_of_a_shard_the_newer_one_counts() -> None:
    """Older files may hold that of an owner whose shard had been taken over."""
    old, new = server(WEIGHTS), server(MOMENTS[0])
    old.version, new.version = 5, 6
    for both in ((old, new), (new, old)):
        found = gathered(bundle({0: one.image()}) for one in both)
        assert torch.equal(found[0], new.image())
