"""A run that goes on from a state, and a replay, are the run, to the bit; and the laws hold on real links."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async.algorithms import sign_wire
from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.async_global import AsyncGlobal
from lightning_async.algorithms.sync_global import SyncGlobal
from lightning_async.algorithms.training import train
from lightning_async.arrival import Arrival, Fate
from lightning_async.replica import Replica
from lightning_async.transport.mail import Carrier
from lightning_async.transport.record import RecordingCarrier
from lightning_async.transport.replay import replay
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import Program, VirtualCluster
from tests.algorithms.legs import through_a_file
from tests.transport.cluster_world import ClusterWorld

N, SIZE, LEG = 4, 80, 40
KNOBS: list[dict[str, Any]] = [
    {"local_steps": 3},
    {"local_steps": "speed", "pace": 4},
    {"local_steps": 2, "outer_momentum": 0.9, "outer_lr": 0.5, "shards": 2},
    {"local_steps": 2, "attenuation": "paper", "wire": "bf16"},
    {"local_steps": 2, "wire": "sign"},
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is as small as here would travel whole."""
    monkeypatch.setattr(sign_wire, "SMALL", 8)


def numbers(rank: int, step: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(1000 * rank + step))


def life(carrier: Carrier, *, exchange: bool = False, **knobs: Any) -> Program:
    """Two legs, each with a meeting; perhaps with another object in the second, which has the first one's state."""
    parameter = nn.Parameter(torch.zeros(SIZE))
    replica, rounds, algorithm = Replica([parameter]), Rounds(carrier, channel=1), AsyncGlobal(**knobs)
    algorithm.begin(replica, carrier, UNIT, rounds)
    arrivals: list[Arrival] = []
    for leg in range(2):
        for step in range(1 + leg * LEG, 1 + (leg + 1) * LEG):
            yield 0.02 * (1 + 0.618 * carrier.me)  # no two at the same time, which chance would put in order
            parameter.data += numbers(carrier.me, step)
            carrier.at(step)
            arrivals += yield from algorithm.after_step(replica, carrier, step)
        consensus = yield from algorithm.meet(replica, carrier)
        arrivals += algorithm.arrived()
        replica.stand_in(consensus)
        replica.stay()
        state = through_a_file(algorithm.state_dict())
        yield from rounds.barrier()
        if exchange and leg == 0:
            algorithm = AsyncGlobal(**knobs)
            algorithm.begin(replica, carrier, UNIT, rounds)
            algorithm.load_state_dict(state)
            yield from rounds.barrier()
        elif leg == 0:
            yield from rounds.barrier()
        algorithm.resume(replica, adopted=True)
    return replica.weights(), arrivals, state["images"]


def told(arrivals: list[Arrival]) -> list[tuple[int, int, int]]:
    """What became of own pushes; answers that came between the same two steps have no order."""
    return sorted((arrival.owner, arrival.base, arrival.folded) for arrival in arrivals)


@pytest.mark.few(3)
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_a_new_object_with_the_old_ones_state_goes_on_to_the_bit(knobs: dict[str, Any]) -> None:
    ends = []
    for exchange in (False, True):
        cluster = VirtualCluster(N, latency=0.01, jitter=0.0)
        ends.append(cluster.run({c.me: life(c, exchange=exchange, **knobs) for c in cluster.carriers}))
    for rank in range(N):
        (one, arrivals, images), (other, others, their_images) = ends[0][rank], ends[1][rank]
        assert torch.equal(one, other)
        assert told(arrivals) == told(others)
        assert torch.equal(images, their_images)


def test_a_state_of_another_method_is_refused_in_words() -> None:
    carrier = VirtualCluster(1).carriers[0]
    algorithm = AsyncGlobal()
    algorithm.begin(Replica([nn.Parameter(torch.zeros(4))]), carrier, UNIT, Rounds(carrier))
    with pytest.raises(ValueError, match="the state of Pairwise does not fit AsyncGlobal: go on with the method"):
        algorithm.load_state_dict({"method": "Pairwise"})


@pytest.mark.parametrize("on_late", ["shrink", "wait"])
def test_a_word_that_nothing_is_left_moves_neither_the_version_nor_the_momentum(on_late: Any) -> None:
    """Whoever says so is at a meeting, here for a second time without a step."""

    def twice(carrier: Carrier) -> Program:
        parameter, rounds = nn.Parameter(torch.zeros(SIZE)), Rounds(carrier, channel=1)
        algorithm = AsyncGlobal(on_late=on_late, outer_momentum=0.9, shards=1)
        algorithm.begin(replica := Replica([parameter]), carrier, UNIT, rounds)
        for step in range(1, 8 + carrier.me):
            yield 0.02
            parameter.data += numbers(carrier.me, step)
            carrier.at(step)
            yield from algorithm.after_step(replica, carrier, step)
        images = []
        for _ in range(2):
            yield from algorithm.stop(replica, carrier)
            consensus = yield from algorithm.meet(replica, carrier)
            images.append(through_a_file(algorithm.state_dict())["images"])
            replica.go_to(consensus)
            algorithm.resume(replica, adopted=True)
        return images

    cluster = VirtualCluster(2, latency=0.005)
    ends = cluster.run({c.me: twice(c) for c in cluster.carriers})
    assert all(torch.equal(first, second) for first, second in ends.values())


@pytest.mark.parametrize("make", [AsyncGlobal, SyncGlobal])
@pytest.mark.parametrize(("knobs", "sentence"), [({"outer_momentum": 0.5}, "outer='Sum'"), ({}, None)])
def test_a_state_of_other_knobs_is_refused_in_words(make: Any, knobs: dict[str, Any], sentence: str | None) -> None:
    carrier = VirtualCluster(1).carriers[0]
    saved, algorithm = make(), make(**knobs)
    for one in (saved, algorithm):
        one.begin(Replica([nn.Parameter(torch.zeros(4))]), carrier, UNIT, Rounds(carrier))
    if sentence is None:
        algorithm.load_state_dict(saved.state_dict())
    else:
        with pytest.raises(ValueError, match=f"the run was saved with {sentence} and goes on with"):
            algorithm.load_state_dict(saved.state_dict())


@pytest.mark.few(1)
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_a_replay_is_the_run_to_the_bit(knobs: dict[str, Any]) -> None:
    """The order of arrivals at each shard is in the log; also of an owner that was frozen, and of a dead one."""
    cluster = VirtualCluster(N, latency=0.01, seed=9, silence=0.3)
    cluster.freeze(0, 0.7, at=0.3)
    cluster.kill(2, at=1.5)
    sinks = [io.StringIO() for _ in range(N)]
    carriers = [RecordingCarrier(c, sink) for c, sink in zip(cluster.carriers, sinks, strict=True)]
    results = cluster.run({c.me: life(c, **knobs) for c in carriers})
    for rank in results:
        carriers[rank].finish()
    logs = {rank: sink.getvalue().splitlines() for rank, sink in enumerate(sinks)}
    again = replay(logs, dict.fromkeys(range(N), lambda carrier: life(carrier, **knobs)))
    assert set(again) == set(results) == {0, 1, 3}
    for rank, (weights, arrivals, images) in results.items():
        assert torch.equal(again[rank][0], weights)
        assert again[rank][1] == arrivals
        assert torch.equal(again[rank][2], images)


@pytest.mark.few(1)
@pytest.mark.parametrize("speeds", [(1, 1, 1), (1, 1, 10)])
@pytest.mark.parametrize("wire", ["fp32", "bf16", "sign"])
def test_on_real_links_one_sample_moves_w_equally_and_nobody_waits(wire: Any, speeds: tuple[int, ...]) -> None:
    """In a random order of the members' steps; the services run in threads of their own."""
    world, chance, n = ClusterWorld(3, silence=60.0), random.Random(3), 3  # nobody is given up, and nothing is lost
    parameters = [nn.Parameter(torch.zeros(64)) for _ in range(n)]
    steps = [300 // s for s in speeds]

    def move(r: int) -> None:
        parameters[r].data[20 * r] += 1.0

    programs = {
        r: train(
            AsyncGlobal(local_steps=2, attenuation="none", wire=wire, shards=1),
            Replica([parameters[r]]),
            world.carriers[r],
            steps=steps[r],
            take_step=lambda k: None,
            optimizer_step=lambda r=r: move(r),
            seconds=lambda me, k: 0.0,
            rounds=Rounds(world.carriers[r]),
        )
        for r in range(n)
    }
    ends = {}

    def step() -> bool:
        r = chance.choices(list(programs), [1 / speeds[r] for r in programs])[0]
        try:
            next(programs[r])
        except StopIteration as end:
            ends[r] = end.value
            del programs[r]
        return not programs

    world.until(lambda: all(len(carrier.live()) == n for carrier in world.carriers), limit=60)  # as a strategy begins
    world.until(step, limit=60)
    world.close()
    for end in ends.values():
        assert torch.equal(end.consensus, ends[0].consensus)
        assert end.waits == 0
        assert {a.fate for a in end.arrivals} == {Fate.FOLDED}
    for r in range(n):
        assert ends[0].consensus[20 * r].item() * n == pytest.approx(steps[r], rel=1e-3)
