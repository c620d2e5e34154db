"""Stages with links between them, at any speeds, compute what the simulator computes, to the bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lightning_async.pipeline.edge import LostStageError
from lightning_async.pipeline.place import Place
from lightning_async.pipeline.stage import Stage
from lightning_async.transport.virtual import VirtualCluster
from tests.pipeline.nets import (
    Net,
    data,
    noisy_blocks,
    plain_blocks,
    train_by_table,
    train_on_links,
    train_plainly,
)

BATCHES = 9


def _equal(a: Net, b: Net) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.weights(), b.weights(), strict=True))


@pytest.mark.few(12)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"order": "forward_first"}, {"shrink": 0.5, "wire": "bf16"}, {"every": 4}])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_simulator_to_the_bit_at_any_speeds(stages: int, options: dict[str, Any], seed: int) -> None:
    chance = random.Random(seed)
    batches = data(BATCHES, last=2)
    table, links = Net(noisy_blocks(), stages), Net(noisy_blocks(), stages)
    expected = train_by_table(table, batches, **options)
    assert train_on_links(links, batches, seconds=lambda s, b: chance.random() ** 8, **options) == expected
    assert _equal(links, table)


@pytest.mark.parametrize("semantics", ["recompute", "hybrid"])
def test_the_other_semantics_too(semantics: str) -> None:
    table, links = (Net(noisy_blocks(), 3, options={"semantics": semantics}) for _ in range(2))
    assert train_on_links(links, data(BATCHES)) == train_by_table(table, data(BATCHES))
    assert _equal(links, table)


@pytest.mark.parametrize("stages", [2, 3])
def test_a_drain_after_each_update_is_synchronous_training(stages: int) -> None:
    plain, drained = Net(noisy_blocks(), stages), Net(noisy_blocks(), stages)
    expected = train_plainly(plain, data(9), every=3)
    assert train_on_links(drained, data(9), every=3, rests=(3, 6)) == expected
    assert _equal(drained, plain)


def test_no_tick_is_common_to_all() -> None:
    """A stage that is late now and then costs its own time, not a tick of everybody's."""
    slow = {(0, 3): 0.5, (1, 9): 0.5, (2, 15): 0.5}
    cluster = VirtualCluster(3, latency=0.001)
    net = Net(plain_blocks(), 3)
    train_on_links(net, data(20), seconds=lambda s, b: 0.1 + slow.get((s, b), 0.0), cluster=cluster)
    in_ticks = 24 * 0.1 + 3 * 0.5
    assert cluster.time < in_ticks


def test_a_run_takes_as_long_as_its_slowest_stage() -> None:
    cluster = VirtualCluster(4, latency=0.001)
    train_on_links(Net(plain_blocks(), 4), data(50), seconds=lambda s, b: (0.02, 0.01, 0.02, 0.01)[s], cluster=cluster)
    assert cluster.time < (50 + 2 * 3) * 0.02 + 0.05


def _turns(place: Place, batches: int) -> Any:
    for batch in range(1, batches + 1):
        yield from place.turn(batch, torch.zeros(2, 6) if place.stage.index == 0 else None, lambda x: x * 1.0)
    yield from place.drain()
    yield from place.rest(batches)


def _last(place: Place, batches: int) -> Any:
    for batch in range(1, batches + 1):
        yield from place.begin(batch)
        parcel = yield from place.arrived(batch)
        yield from place.give_back(batch, parcel.tensor)
        yield from place.end()
    yield from place.drain()
    yield from place.rest(batches)


def _two(cluster: VirtualCluster) -> tuple[Place, Place]:
    stages = [Stage(s, 2, []) for s in range(2)]
    first, last = (Place(s, cluster.carriers[1 - s.index], [1, 0], update=lambda: None) for s in stages)
    return first, last


@pytest.mark.parametrize(("first", "last"), [(5, 7), (7, 5)])
def test_stages_with_different_numbers_of_batches_hear_it_at_once(first: int, last: int) -> None:
    cluster = VirtualCluster(2, limit=50.0)
    one, two = _two(cluster)
    with pytest.raises(LostStageError, match="must be given the same batches"):
        cluster.run({1: _turns(one, first), 0: _last(two, last)})
    assert cluster.time < 5.0


def test_a_stage_that_dies_ends_the_others_with_a_sentence() -> None:
    cluster = VirtualCluster(2, silence=1.0, patience=3.0)
    one, two = _two(cluster)

    def slowly() -> Any:
        for batch in range(1, 100):
            yield 0.1
            yield from one.turn(batch, torch.zeros(2, 6), lambda x: x * 1.0)

    cluster.kill(1, at=2.0)
    with pytest.raises(LostStageError, match="rank 1 died, and its stage with it"):
        cluster.run({1: slowly(), 0: _last(two, 99)})
    assert cluster.time < 2.0 + 3.0 + 1.5


def test_delays_are_counted_in_own_updates() -> None:
    cluster = VirtualCluster(2)
    net = Net(plain_blocks(), 2)
    places = [
        Place(s, cluster.carriers[1 - s.index], [1, 0], update=lambda s=s: net.update(s.index)) for s in net.places
    ]

    def first() -> Any:
        for batch, (x, _) in enumerate(data(6), start=1):
            yield from places[0].turn(batch, x, net.chains[0].__call__)
        yield from places[0].drain()

    cluster.run({1: first(), 0: _only_back(places[1], 6)})
    arrivals = places[0].arrivals
    assert [a.base for a in arrivals] == [1, 2, 3, 4, 5, 6]
    assert [a.delay for a in arrivals] == [0, 1, 1, 1, 1, 1]
    assert all(a.peer == 0 and a.factor == 1.0 for a in arrivals)


def _only_back(place: Place, batches: int) -> Any:
    for batch in range(1, batches + 1):
        yield from place.begin(batch)
        parcel = yield from place.arrived(batch)
        yield from place.give_back(batch, parcel.tensor)
        yield from place.end()
