"""Whoever freezes, dies or is cut off, also in mid-reply: the others' exchanges go on, and what is lost is counted.

Every shard has a number of each member's, to which each of its steps adds 1: so the consensus tells, for every owner,
how many steps of every member it has.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from lightning_async.algorithms.async_global import AsyncGlobal
from lightning_async.algorithms.shard_service import ShardService
from lightning_async.algorithms.shards import ANSWER, CUT
from lightning_async.algorithms.training import Trained, train
from lightning_async.arrival import Fate
from lightning_async.replica import Replica
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster

N, STEPS, STEP, SILENCE = 5, 150, 0.02, 0.3
SOON = 1.2  # seconds within which exchanges of all others must have gone on
BYTES = 4 * CUT  # of a shard: a number of each member's, and gaps
REPLY = 1.5 * STEP  # seconds that one takes


@dataclass
class World:
    """Members, their service and what came of them."""

    seed: int
    every: int
    cluster: VirtualCluster = field(init=False)
    trained: dict[int, Trained] = field(default_factory=dict)
    answers: list[tuple[float, int, int]] = field(default_factory=list)  # when it left, from whom, to whom
    watch: Callable[[Any], None] = lambda packet: None

    def __post_init__(self) -> None:
        bandwidth = (BYTES + 128) / REPLY
        self.cluster = VirtualCluster(
            N, latency=0.005, jitter=1.0, seed=self.seed, silence=SILENCE, bandwidth=bandwidth
        )
        send = self.cluster._wire.send

        def watched(link: Any, packet: Any) -> None:
            send(link, packet)
            if packet.message.kind == ANSWER:
                self.answers.append((self.cluster.time, packet.sender, packet.receiver))
            self.watch(packet)

        self.cluster._wire.send = watched  # type: ignore[method-assign]

    def run(self) -> World:
        programs = {}
        for r, carrier in enumerate(self.cluster.carriers):
            parameter = nn.Parameter(torch.zeros(N * CUT))

            def step(parameter: nn.Parameter = parameter, r: int = r) -> None:
                parameter.data[r::CUT] += 1.0

            programs[r] = train(
                AsyncGlobal(attenuation="none", mirror_every=self.every),
                Replica([parameter]),
                carrier,
                steps=STEPS,
                take_step=lambda k: None,
                optimizer_step=step,
                seconds=lambda me, k: STEP * (1 + 0.01 * me),
                rounds=Rounds(carrier),
            )
        self.trained = self.cluster.run(programs)
        return self

    def lost(self, r: int) -> int:
        """Samples of this member that were declared lost."""
        return sum(a.samples for a in self.trained[r].arrivals if a.fate is Fate.LOST)

    @property
    def losses(self) -> int:
        """Arrivals that were."""
        return sum(a.fate is Fate.LOST for one in self.trained.values() for a in one.arrivals)

    def has(self, shard: int, r: int) -> float:
        """Steps of this member that the consensus has in this shard."""
        consensus = self.trained[r].consensus
        assert consensus is not None
        return consensus[CUT * shard + r].item() * N

    def went_on(self, since: float, until: float, without: set[int]) -> bool:
        """Whether each of the others had answers of each of the others."""
        pairs = Counter((a, b) for when, a, b in self.answers if since <= when <= until)
        rest = set(range(N)) - without
        return all(pairs[a, b] for a in rest for b in rest - {a})

    def ends_equal(self) -> bool:
        ends = [one.consensus for one in self.trained.values()]
        return all(torch.equal(ends[0], end) for end in ends)  # type: ignore[arg-type]


def in_mid_reply(world: World, owner: int, after: float, strike: Callable[[float], None]) -> list[float]:
    """When half of the first reply that this owner begins after this time has left; it is struck then."""
    struck: list[float] = []

    def watch(packet: Any) -> None:
        now = world.cluster.time
        if not struck and packet.sender == owner and packet.message.kind == ANSWER and now > after:
            struck.append((now + packet.departs) / 2)
            strike(struck[0])

    world.watch = watch
    return struck


@pytest.mark.few(5)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("owner", range(N))
def test_an_owner_that_freezes_in_mid_reply(owner: int, seed: int) -> None:
    chance = random.Random(10 * owner + seed)
    world = World(seed, every=(2, 7, 40)[seed])
    struck = in_mid_reply(
        world, owner, chance.uniform(0.3, 1.3), lambda at: world.cluster.freeze(owner, chance.choice([0.2, 0.8]), at=at)
    )
    world.run()
    assert struck
    assert all(one.waits == 0 for one in world.trained.values())
    assert world.went_on(struck[0], struck[0] + SOON, {owner})
    assert world.ends_equal()
    assert world.losses <= world.every
    for r in range(N):
        for shard in range(N):
            missing = STEPS - world.has(shard, r)
            assert missing == pytest.approx(world.lost(r) if shard == owner else 0, abs=1e-2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("owner", range(N))
def test_an_owner_that_dies_in_mid_reply(owner: int, seed: int) -> None:
    chance = random.Random(10 * owner + seed)
    world = World(seed, every=(2, 7, 40)[seed])
    struck = in_mid_reply(world, owner, chance.uniform(0.3, 1.3), lambda at: world.cluster.kill(owner, at=at))
    world.run()
    assert struck
    assert set(world.trained) == set(range(N)) - {owner}
    assert all(one.waits == 0 for one in world.trained.values())
    assert world.went_on(struck[0], struck[0] + SOON, {owner})
    assert world.ends_equal()
    assert world.losses <= world.every


@pytest.mark.parametrize("seconds", [0.2, 0.8])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("owner", [0, 2, 4])
def test_a_push_is_held_while_its_owner_and_the_next_member_are_cut_off(
    owner: int, seed: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a mirror that cannot leave, and its answer could not come: it is found again, and counts once."""
    world, held = World(seed, every=2), list[float]()
    pushed = ShardService._pushed

    def watched(self: ShardService, letter: Any) -> Any:
        answers = pushed(self, letter)
        waits = any(owned.held for owned in self.owned.values())
        if waits and not held and self._me == owner and world.cluster.time > 0.2 + 0.3 * seed:
            held.append(world.cluster.time)
            for member in (owner, (owner + 1) % N):
                world.cluster.cut(member, seconds=seconds, at=world.cluster.time)
        return answers

    monkeypatch.setattr(ShardService, "_pushed", watched)
    world.run()
    assert held
    assert all(one.waits == 0 for one in world.trained.values())
    assert world.went_on(held[0], held[0] + SOON, {owner, (owner + 1) % N})
    assert world.ends_equal()
    for r in range(N):
        missing = [STEPS - world.has(shard, r) for shard in range(N)]
        assert sum(missing) == pytest.approx(world.lost(r), abs=1e-2)
