"""Ranks of one attempt find each other in a store that earlier ones have written in, and never one of those."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta

import pytest
from torch.distributed import Store as TorchStore
from torch.distributed import TCPStore

from benchmarks.store import Store
from lightning_async.transport.attempts import ROOT, fresh

LIMIT = timedelta(seconds=20)


@pytest.fixture
def port() -> Iterator[int]:
    with closing(Store()) as store:
        yield store.port


def client(port: int) -> TorchStore:
    return TCPStore("127.0.0.1", port, is_master=False, timeout=LIMIT)


def attempt(port: int, world: int, ranks: list[int] | None = None) -> list[TorchStore]:
    """All ranks of an attempt come, each with a connection of its own, in this order."""
    ranks = list(range(world)) if ranks is None else ranks
    with ThreadPoolExecutor(world) as pool:
        found = {r: pool.submit(fresh, client(port), r, world, LIMIT) for r in ranks}
        return [found[r].result() for r in sorted(found)]


@pytest.mark.parametrize("world", [2, 5])
def test_all_ranks_of_an_attempt_share_a_part_of_the_store_that_is_new(port: int, world: int) -> None:
    for _ in range(3):
        parts = attempt(port, world)
        assert not any(part.check(["address"]) for part in parts)
        parts[0].set("address", "here")
        assert {part.get("address") for part in parts} == {b"here"}


@pytest.mark.parametrize("came", [[0], [1, 2], [0, 2]])
def test_an_attempt_that_never_became_complete_is_no_part_of_the_next(port: int, came: list[int]) -> None:
    """Its ranks have said hello, or welcome, and were killed."""
    patience = timedelta(seconds=0.2)
    with ThreadPoolExecutor(3) as pool:
        early = [pool.submit(fresh, client(port), r, 3, patience) for r in came]
        assert all("for all 3 ranks to begin" in str(one.exception()) for one in early)
    parts = attempt(port, 3, [2, 1, 0])
    parts[2].set("address", "here")
    assert parts[0].get("address") == parts[1].get("address") == b"here"


def test_who_lingers_of_an_earlier_attempt_does_not_keep_the_next_from_beginning(port: int) -> None:
    """An old rank 1 that says its hello again and again, until its node ends it."""
    store, ended = client(port), threading.Event()

    def lingers() -> None:
        for k in range(200):
            store.set(f"{ROOT}/hello/1", f"old {k}")
            if ended.wait(0.002):
                return

    with ThreadPoolExecutor(1) as pool:
        old = pool.submit(lingers)
        parts = attempt(port, 2)
        ended.set()
        old.result()
    parts[0].set("address", "here")
    assert parts[1].get("address") == b"here"
