"""Ranks that are not alike are stopped before they train, with what is unlike and where."""

from __future__ import annotations

import os
from typing import Any

import pytest

from lightning_async import AsyncGlobalStrategy, GossipRingStrategy
from lightning_async.strategies.alike import check_alike, creed
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster
from tests.strategies.lit import Lit, loader, trainer
from tests.strategies.ranks import Forked

GOSSIP = {"version": "1", "strategy": "gossip_ring", "mode": "pairwise", "period": 1}


def _say(creeds: list[dict[str, Any]]) -> None:
    cluster = VirtualCluster(len(creeds))
    cluster.run({r: check_alike(mine, Rounds(cluster.carriers[r])) for r, mine in enumerate(creeds)})


def test_ranks_that_are_alike_go_on() -> None:
    _say([GOSSIP, GOSSIP, GOSSIP])


@pytest.mark.parametrize(
    ("unlike", "sentence"),
    [
        ({"version": "2"}, "version='1' on rank 0, 2, version='2' on rank 1"),
        ({"mode": "none", "period": 2}, "mode='pairwise' on rank 0, 2, mode='none' on rank 1"),
        ({"wire": "bf16"}, "wire=None on rank 0, 2, wire='bf16' on rank 1"),
    ],
)
def test_what_is_unlike_is_named(unlike: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RuntimeError, match=f"not alike: {sentence}. Give all of them the same lightning_async"):
        _say([GOSSIP, GOSSIP | unlike, GOSSIP])


def test_what_belongs_to_a_host_may_differ() -> None:
    assert creed(GossipRingStrategy()) == creed(GossipRingStrategy(inner_threads=2, record="here", patience=60.0))
    for knobs in ({"mode": "none"}, {"wire": "bf16"}, {"balance": "equal"}, {"at_meeting": "keep"}, {"period": 2}):
        assert creed(GossipRingStrategy()) != creed(GossipRingStrategy(**knobs))
    assert creed(GossipRingStrategy())["strategy"] != creed(AsyncGlobalStrategy())["strategy"]


def _another_mode() -> None:
    mode = "push_sum" if os.environ["RANK"] == "1" else "pairwise"
    trainer(2, knobs={"mode": mode}).fit(Lit(), loader(), loader(10, shuffle=False))


def test_a_rank_of_another_mode_stops_all_before_they_train() -> None:
    """Their letters are of other kinds: each would wait for the other's as long as a meeting may last."""
    with Forked(2, _another_mode) as forked:
        results = forked.results(30)
    assert all(
        "the ranks are not alike: mode='pairwise' on rank 0, mode='push_sum' on rank 1" in r.error for r in results
    )
