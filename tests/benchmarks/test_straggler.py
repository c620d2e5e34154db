"""What the table of one slow rank is made of: each way of being slow, post-local SGD that ends where all are equal."""

from __future__ import annotations

import pytest

from benchmarks.rivals import PERIOD, POST_LOCAL
from benchmarks.straggler import FAIR, N, settings
from benchmarks.subject import GOSSIP, subject
from benchmarks.weighing import weigh
from benchmarks.work import Work
from tests.strategies.ranks import run


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
def test_a_step_of_a_slow_rank_weighs_as_much(strategy: str) -> None:
    work = Work(40, step=0.002, slow={1: 4.0})
    found = run(2, weigh, work.arguments(None)["work"], subject(strategy))
    (mine, moved), (theirs, moved_too) = found
    assert moved == moved_too
    assert mine + theirs == 40
    weights = [2 * moved[0] / mine, 2 * moved[1] / theirs]
    assert max(weights) / min(weights) < FAIR
