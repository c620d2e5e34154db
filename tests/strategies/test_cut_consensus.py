"""What the first rank gathers of a cut: it is whole when all have said so and all is added up, or it says why not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lightning_async.strategies.cut_consensus import PIECE, Gathering, key, piece_of
from lightning_async.transport.mail import LONGEST
from lightning_async.transport.virtual import VirtualCluster

LIMIT = 30.0


class Run:
    """Three members, of which the first began cut 5."""

    def __init__(self) -> None:
        self.cluster = VirtualCluster(3, silence=0.1)
        self.gathering = Gathering(5, 100, self.cluster.carriers[0])

    def says(self, rank: int, *, adds: bool = True, **other: Any) -> None:
        said = {"members": [0, 1, 2], "deaths": [], "counts": b"x".hex(), "data": {"epoch": 0, "done": []}, **other}
        self.cluster.carriers[rank].propose(key(5, rank), json.dumps(said).encode())
        if adds:
            self.gathering.add(rank, torch.ones(2), 1)
        for _ in range(2):  # it asks, and is answered
            self.gathering.hear()
            self.cluster.advance(0.5)
        self.gathering.hear()

    def why_not(self) -> str:
        return self.gathering.why_not(LIMIT)


def test_it_is_whole_when_all_of_it_is_here() -> None:
    run = Run()
    for rank in (0, 2):
        run.says(rank)
    run.says(1, adds=False)
    assert not run.gathering.whole
    run.gathering.add(1, torch.ones(2), 1)
    assert (run.gathering.whole, run.why_not()) == (True, "")
    assert run.gathering.members == (0, 1, 2)
    assert run.gathering.counts == dict.fromkeys((0, 1, 2), b"x")
    run.cluster.kill(1)
    run.cluster.advance(1.0)
    assert run.why_not() == "", "who has given its part may die"


def test_a_part_is_here_with_its_last_piece() -> None:
    run = Run()
    for rank in (0, 2):
        run.says(rank)
    run.says(1, adds=False)
    run.gathering.add(1, torch.ones(1), 1, at=0, numel=2)
    assert not run.gathering.whole
    run.gathering.add(1, torch.ones(1), 1, at=1, numel=2)
    assert run.gathering.whole
    assert [mean.tolist() for mean in run.gathering.total.means(0)] == [[], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("nbytes", "members", "piece"),
    [(100, 3, 100), (PIECE, 9, PIECE), (8 * PIECE, 5, 2 * PIECE), (8 * PIECE, 100, PIECE), (2 * LONGEST, 2, LONGEST)],
)
def test_pieces_of_all_others_together_are_as_long_as_one_vector(nbytes: int, members: int, piece: int) -> None:
    assert piece_of(nbytes, members) == piece


def test_a_death_before_a_part_was_here() -> None:
    run = Run()
    run.says(0)
    run.says(1, adds=False)
    run.cluster.kill(1)
    run.cluster.advance(1.0)
    assert run.why_not() == "rank 1 died before its part was here"
    assert run.gathering.by_death


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"deaths": [2]}, "rank 2 died before its marker reached rank 1"),
        ({"members": [0, 1]}, "rank 1 recorded it among ranks [0, 1], and rank 0 among others"),
    ],
)
def test_parts_that_make_no_cut(other: dict[str, Any], sentence: str) -> None:
    run = Run()
    run.says(0)
    run.says(1, **other)
    assert run.why_not() == sentence
    assert run.gathering.by_death


def test_who_takes_no_part_is_not_waited_for_for_ever() -> None:
    run = Run()
    run.says(0)
    run.says(2)
    run.cluster.advance(LIMIT - 5)
    assert run.why_not() == ""
    run.cluster.advance(6.0)
    assert run.why_not().startswith("the part of rank 1 was not here after 3")
    assert not run.gathering.by_death
