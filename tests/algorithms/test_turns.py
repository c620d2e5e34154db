"""Turns: exactly one token at any time, whoever pushes, bids, dies or pauses, and nobody is left out for ever."""

from __future__ import annotations

import random

import pytest

from lightning_async.algorithms.turns import Turns


@pytest.mark.parametrize("inherited", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_nobody_has_two_tokens_and_who_may_gets_one(skip: bool, seed: int, inherited: bool) -> None:
    chance, members, pausing = random.Random(seed), [0, 1, 2, 3, 4], set[int]()
    unheard = set(members) if inherited else set[int]()
    turns, held = Turns(None if inherited else 2, skip=skip, strangers=unheard), set[int]() if inherited else {2}
    for _ in range(300):  # what the members know: who may push once
        event, peer = chance.choice(["push", "push", "bid", "pause", "go on", "die"]), chance.choice(members)
        unheard.discard(peer)
        if event == "push" and peer in held:
            held.discard(peer)
            turns.pushed(peer)
        elif event == "bid":
            turns.bid(peer, members)
        elif event == "pause" and peer not in held:
            pausing.add(peer)
        elif event == "go on":
            pausing.discard(peer)
        elif event == "die" and len(members) > 2 and chance.random() < 0.05:
            members.remove(peer)
            held.discard(peer)
            pausing.discard(peer)
        granted = turns.grant(members, pausing | unheard)
        late = turns.meet(members, unheard)
        for given in late if granted is None else [granted, *late]:
            assert given not in held | unheard
            held.add(given)
        assert granted not in pausing
        assert skip or not late
        assert held == turns.passed | ({turns.holder} - {None})
        assert turns.holder is not None or set(members) <= held | pausing | unheard
    assert skip or not turns.passed


def test_the_ring_is_in_order_and_strict_waits_for_an_idle_holder() -> None:
    turns, order = Turns(1, skip=False), []
    for _ in range(6):
        assert turns.holder is not None
        order.append(turns.holder)
        for other in range(3):
            turns.bid(other, [])
        assert turns.grant([0, 1, 2], ()) is None
        turns.pushed(order[-1])
        turns.grant([0, 1, 2], ())
    assert order == [1, 2, 0, 1, 2, 0]


def test_skip_passes_over_who_keeps_another_waiting_for_two_batches_or_is_not_heard() -> None:
    turns = Turns(0, skip=True)
    for peer in (1, 2):
        turns.bid(peer, [0, 1, 2])
    assert turns.grant([0, 1, 2], ()) is None
    turns.bid(2, [0, 1, 2])
    assert turns.grant([0, 1, 2], ()) == 1
    turns.bid(2, [0, 2])
    assert turns.grant([0, 1, 2], ()) == 2
    assert turns.passed == {0, 1}
    turns.pushed(2)
    assert turns.grant([0, 1, 2], ()) == 2
    turns.pushed(1)
    turns.pushed(2)
    assert turns.grant([0, 1, 2], ()) == 1


def test_who_is_heard_by_an_heir_may_push_once_whoever_has_the_turn() -> None:
    """Who waits for a turn here may be the idle holder of another shard, whom all others wait for."""
    turns, unheard = Turns(after=0, skip=True, strangers=[0, 1, 2]), {0, 2}
    assert turns.grant([0, 1, 2], unheard) == 1
    assert turns.meet([0, 1, 2], unheard) == []
    unheard.discard(2)
    assert turns.grant([0, 1, 2], unheard) is None
    assert turns.meet([0, 1, 2], unheard) == [2]
    assert turns.passed == {2}
    for peer in (1, 2):
        turns.pushed(peer)
    assert turns.grant([0, 1, 2], unheard) == 2
    assert turns.meet([0, 1, 2], unheard) == []  # once


def test_a_holder_that_is_idle_may_push_late_and_the_turn_goes_on() -> None:
    turns = Turns(0, skip=True)
    turns.bid(1, [0, 1], idle=True)  # of one that had its turn when it said so
    assert turns.grant([0, 1], ()) is None
    turns.bid(0, [0, 1], idle=True)
    assert turns.grant([0, 1], ()) == 1
    turns.pushed(1)
    assert turns.grant([0, 1], ()) == 1
    turns.pushed(0)
    turns.bid(1, [0, 1], idle=True)
    assert turns.grant([0, 1], ()) == 0
