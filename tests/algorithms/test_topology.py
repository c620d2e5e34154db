"""Topologies as tables: edges have one initiator, partners are who they should be, the ring closes over the dead."""

from __future__ import annotations

import pytest

from lightning_async.algorithms.topology import TOPOLOGIES, Topology, hops, neighbours, onward, partner


def test_the_ring() -> None:
    members = (0, 1, 2, 3)
    assert [onward("ring", members, r) for r in members] == [[1], [2], [3], [0]]
    assert [neighbours("ring", members, r) for r in members] == [[1, 3], [0, 2], [1, 3], [0, 2]]
    assert [partner("ring", members, 0, turn) for turn in range(4)] == [1, 3, 1, 3]


def test_the_ring_closes_over_the_dead() -> None:
    assert onward("ring", (0, 2, 3), 0) == [2]
    assert neighbours("ring", (0, 2, 3), 2) == [0, 3]


def test_one_peer_exponential() -> None:
    members = tuple(range(8))
    assert hops("exponential", 8) == [1, 2, 4]
    assert [partner("exponential", members, 5, turn) for turn in range(4)] == [6, 7, 1, 6]
    assert neighbours("exponential", members, 0) == [1, 2, 4, 6, 7]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("n", range(1, 18))
def test_every_edge_has_one_initiator_and_both_ends_know_it(topology: Topology, n: int) -> None:
    members = tuple(range(0, 2 * n, 2))
    begun = [tuple(sorted((r, peer))) for r in members for peer in onward(topology, members, r)]
    known = {tuple(sorted((r, peer))) for r in members for peer in neighbours(topology, members, r)}
    assert len(begun) == len(set(begun))
    assert set(begun) == known


def test_a_pair_has_one_edge_and_one_member_is_alone() -> None:
    assert [onward("ring", (3, 7), r) for r in (3, 7)] == [[7], []]
    assert onward("ring", (4,), 4) == []
    assert partner("ring", (4,), 4, 0) is None
