"""Ranks that are not alike are stopped before they train, with what is unlike and where."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async import AsyncGlobalStrategy, GossipRingStrategy, LazySignStrategy
from lightning_async.strategies.alike import check_alike, creed
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster
from tests.strategies import piped
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
    for knobs in ({"mode": "none"}, {"wire": "bf16"}, {"balance": "equal"}, {"at_meeting": "keep"}, {"period": 3}):
        assert creed(GossipRingStrategy()) != creed(GossipRingStrategy(**knobs))
    assert creed(LazySignStrategy(exact=["*.weight"])) != creed(LazySignStrategy())
    assert creed(GossipRingStrategy())["strategy"] != creed(AsyncGlobalStrategy())["strategy"]


def _unlike(knobs: dict[str, Any], options: dict[str, Any]) -> None:
    first = os.environ["RANK"] == "0"
    strategy = GossipRingStrategy(**({} if first else knobs))
    saves = {"enable_checkpointing": "callbacks" in options}
    t = trainer(2, strategy=strategy, **saves, **({} if first else options))
    t.fit(Lit(), loader(), loader(10, shuffle=False))


@pytest.mark.parametrize(
    ("knobs", "options", "sentence"),
    [
        ({"mode": "push_sum"}, {}, "mode='pairwise' on rank 0, mode='push_sum' on rank 1"),
        ({}, {"max_epochs": 3}, "max_epochs=2 on rank 0, max_epochs=3 on rank 1"),
        (
            {},
            {"accumulate_grad_batches": 2},
            "accumulate_grad_batches=1 on rank 0, accumulate_grad_batches=2 on rank 1",
        ),
        (
            {},
            {"check_val_every_n_epoch": 2},
            "check_val_every_n_epoch=1 on rank 0, check_val_every_n_epoch=2 on rank 1",
        ),
        (
            {},
            {"limit_train_batches": 10},
            "limit_train_batches=1.0 on rank 0, limit_train_batches=10 on rank 1",
        ),
        (
            {},
            {"val_check_interval": "00:00:00:02"},
            "val_check_interval=1.0 on rank 0, val_check_interval='2.0 s' on rank 1",
        ),
        (
            {},
            {"callbacks": [ModelCheckpoint(every_n_train_steps=7)]},
            "every_n_train_steps=[0] on rank 0, every_n_train_steps=[7] on rank 1",
        ),
        (
            {},
            {"callbacks": [ModelCheckpoint(train_time_interval=timedelta(seconds=3))]},
            "train_time_interval=[0.0] on rank 0, train_time_interval=[3.0] on rank 1",
        ),
    ],
)
def test_an_unlike_rank_stops_all_before_they_train(
    knobs: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    """Each would wait for what the other never sends as long as a meeting may last."""
    with Forked(2, _unlike, knobs, options) as forked:
        results = forked.results(30)
    assert all(f"the ranks are not alike: {sentence}" in r.error for r in results), results


def _another_order() -> None:
    order = "update_first" if os.environ["RANK"] == "0" else "forward_first"
    piped.trainer(2, knobs={"order": order}).fit(piped.Piped(), piped.loader(), piped.loader(n=8))


def test_stages_of_another_order_do_not_start_either() -> None:
    with Forked(2, _another_order) as forked:
        results = forked.results(30)
    assert all("the ranks are not alike: order='update_first' on rank 0" in r.error for r in results), results
