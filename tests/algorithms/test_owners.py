"""Who owns a shard: the first word on the board, and nobody's silence but his who was heard, or had time to be."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_async.algorithms.owners import A_WHILE, Owners
from lightning_async.algorithms.shards import RUN, place
from lightning_async.transport.virtual import VirtualCluster


class Hearing:
    """A member's end of the board of which the test says who is heard, and how late it is."""

    def __init__(self, board: Any) -> None:
        self.board, self.heard, self.time = board, (0, 1, 2), 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.board, name)

    def live(self) -> tuple[int, ...]:
        return self.heard

    def now(self) -> float:
        return self.time


@pytest.fixture
def seen() -> tuple[VirtualCluster, Hearing, Owners]:
    cluster = VirtualCluster(3)
    hearing = Hearing(cluster.carriers[0])
    return cluster, hearing, Owners(hearing, 3, run=1)  # type: ignore[arg-type]


def owner_later(seen: tuple[VirtualCluster, Hearing, Owners], shard: int) -> int:
    cluster, _, owners = seen
    owners.look(shard)
    cluster.advance(0.1)
    owners.look(shard)
    return owners.owner(shard)


def test_who_falls_silent_has_an_heir(seen: tuple[VirtualCluster, Hearing, Owners]) -> None:
    assert [owner_later(seen, shard) for shard in range(3)] == [0, 1, 2]
    seen[1].heard = (0, 2)
    assert [owner_later(seen, shard) for shard in range(3)] == [0, 2, 2]


def test_who_was_never_heard_is_not_silent_at_first(seen: tuple[VirtualCluster, Hearing, Owners]) -> None:
    seen[1].heard = (0, 2)
    assert owner_later(seen, 1) == 1
    seen[1].time = A_WHILE + 0.1
    assert owner_later(seen, 1) == 2


def test_who_hears_hardly_anybody_takes_nothing(seen: tuple[VirtualCluster, Hearing, Owners]) -> None:
    owner_later(seen, 1)
    seen[1].heard = (0,)
    assert owner_later(seen, 1) == 1


def test_who_is_sought_for_a_later_place_finds_all_owners_up_to_that(
    seen: tuple[VirtualCluster, Hearing, Owners],
) -> None:
    cluster, _, owners = seen
    for generation, heir in ((2, b"2"), (3, b"0")):
        cluster.carriers[1].propose(f"shard/1/1/{generation}", heir)
    cluster.advance(0.1)
    assert owner_later(seen, 1) == 1  # nobody is silent
    owners.sought(place(1, RUN + 3))
    assert owner_later(seen, 1) == 0
    assert owners.place(1) == place(1, RUN + 3)
