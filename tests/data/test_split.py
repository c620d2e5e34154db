"""A member's batches are dealt out to its ranks: each sample once, as many for each, and all of them end together."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lightning_async.data.share import make_share
from lightning_async.data.split import SplitShare, check_loaders_alike, dealt
from lightning_async.transport.layers import Speakers
from lightning_async.transport.mail import Carrier
from lightning_async.transport.pages import Pages
from lightning_async.transport.siblings import Siblings
from lightning_async.transport.virtual import VirtualCluster


def _trains(carrier: Carrier, total: int, balance: Any, seconds: float) -> Any:
    """One rank of a member of two, in a world of four, over one epoch: its batches."""
    first = carrier.me - carrier.me % 2
    siblings = Siblings(carrier, (first, first + 1))
    desk = Pages(cast(Carrier, Speakers(carrier, (0, 2))), 1).desk(0)
    share = SplitShare(make_share(balance, desk, batch=6) if siblings.speaks else None, siblings)
    share.begin_epoch(0, total=total)
    share.rewind()
    batches, counted = [], 0
    while (batch := (yield from share.next_batch(3))) is not None:
        batches.append(batch)
        yield seconds
        counted += share.completed()
        assert not share.dry
    assert share.dry
    return batches, counted


@pytest.mark.parametrize("balance", ["claim", "equal", "incremental"])
@pytest.mark.parametrize("total", [120, 125, 7])
def test_every_sample_is_trained_on_and_counted_once(total: int, balance: str) -> None:
    cluster = VirtualCluster(4)
    ends = cluster.run({c.me: _trains(c, total, balance, 0.1 if c.me < 2 else 0.3) for c in cluster.carriers})
    seen = Counter(position for batches, _ in ends.values() for batch in batches for position in batch)
    assert set(seen) == set(range(total))
    for one, other in ((0, 1), (2, 3)):
        assert [len(batch) for batch in ends[one][0]] == [len(batch) for batch in ends[other][0]]
    counted = ends[0][1] + ends[2][1]
    assert counted == (total + total % 2 if balance == "equal" else total)
    assert sum(seen.values()) - counted <= 2 * (1 if balance != "incremental" else 10)


@pytest.mark.parametrize(
    ("batch", "ranks", "parts"),
    [
        ([1, 2, 3, 4], 2, [[1, 3], [2, 4]]),
        ([1, 2, 3], 2, [[1, 3], [2, 1]]),
        ([1], 3, [[1], [1], [1]]),
        ([1, 2, 3], 1, [[1, 2, 3]]),
    ],
)
def test_a_batch_is_dealt_out_like_cards(batch: list[int], ranks: int, parts: list[list[int]]) -> None:
    assert dealt(batch, ranks) == parts


def test_loaders_that_are_unlike_are_refused() -> None:
    cluster = VirtualCluster(2)
    loaders = [SimpleNamespace(batch_size=4, num_workers=0), SimpleNamespace(batch_size=4, num_workers=2)]
    own = [Siblings(carrier, (0, 1)) for carrier in cluster.carriers]
    with pytest.raises(RuntimeError, match="num_workers=0 on rank 0, and num_workers=2 on rank 1"):
        cluster.run({r: check_loaders_alike(loaders[r], own[r]) for r in range(2)})
