"""What a process says of its world where it has none: in a replay, the rank and the world of the run."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch.utils.data import DistributedSampler

from lightning_async.transport.stage import Program, Stage
from lightning_async.transport.world import seen_as


def look() -> tuple[int, int, str | None, str | None]:
    return dist.get_rank(), dist.get_world_size(), os.environ.get("RANK"), os.environ.get("WORLD_SIZE")


def test_who_asks_hears_of_the_rank_of_then() -> None:
    assert not dist.is_initialized()
    with seen_as(2, 3):
        assert look() == (2, 3, "2", "3")
        assert list(DistributedSampler(range(6), shuffle=False)) == [2, 5]  # type: ignore[arg-type]
        with seen_as(0, 2):
            assert look() == (0, 2, "0", "2")
        assert look() == (2, 3, "2", "3")
    assert not dist.is_initialized()
    assert "RANK" not in os.environ
    assert "WORLD_SIZE" not in os.environ


def test_it_is_put_back_behind_an_error() -> None:
    try:
        with seen_as(1, 2):
            raise RuntimeError
    except RuntimeError:
        assert not dist.is_initialized()
    assert "RANK" not in os.environ


def test_each_actor_of_a_stage_sees_its_own() -> None:
    """Whoever waits in the middle of it sees the same behind its wait, and nobody else does."""
    stage, met = Stage(), set[int]()

    def life(rank: int) -> Program:
        yield "begin"
        with seen_as(rank, 3):
            met.add(rank)
            stage.moved()
            while len(met) < 3:
                assert look()[:3] == (rank, 3, str(rank))
                stage.rest("the others")
            found = look()
        return found, dist.is_initialized()

    actors = stage.run({rank: life(rank) for rank in range(3)})
    assert [actor.result for actor in actors] == [((r, 3, str(r), "3"), False) for r in range(3)]
    assert not dist.is_initialized()
