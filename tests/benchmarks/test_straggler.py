"""What the table of one slow rank is made of: each way of being slow, post-local SGD that ends where all are equal."""

from __future__ import annotations

import pytest

from benchmarks.rivals import PERIOD, POST_LOCAL
from benchmarks.straggler import N, sample_weights, settings
from benchmarks.subject import GOSSIP
from benchmarks.work import Work


def test_a_slow_rank_a_slower_one_and_uneven_ones() -> None:
    assert [setting.name for setting in settings(quick=False)] == ["4x", "10x", "sigma 1"]
    assert settings(quick=True)[-1].name == "sigma 1"
    uneven = settings(quick=False)[-1].work
    assert Work.read(uneven.arguments(None)["work"]) == uneven


@pytest.mark.parametrize("quick", [True, False])
def test_controls_stand_beside_and_post_local_sgd_averages_behind_its_last_step(quick: bool) -> None:
    for setting in settings(quick):
        variants = setting.variants()
        assert {GOSSIP, "none", "ddp", "sync", POST_LOCAL} <= set(variants)
        knobs, work = variants[POST_LOCAL]
        assert knobs is not None
        last = work.batches * work.epochs // N - 1
        assert work.batches % N == 0
        assert 0 <= knobs[POST_LOCAL]["start"] <= last / 3
        assert (last - knobs[POST_LOCAL]["start"]) % PERIOD == 0


@pytest.mark.parametrize("strategy", [GOSSIP, "async_global"])
def test_a_sample_of_uneven_ranks_weighs_the_same(strategy: str) -> None:
    weights = sample_weights(1.0, steps=50, strategy=strategy, sigma=1.0)
    assert max(weights) / min(weights) < 1.1
