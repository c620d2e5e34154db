"""Who holds the token is killed, frozen or cut off: the others push on within 3 s, and there is one token at any time.

Everything is at its default: silence 2 s, patience 30 s. On the virtual cluster, some hundred seeds.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.async_global import AsyncGlobal
from lightning_async.algorithms.shard_service import ROUNDS, ShardService
from lightning_async.algorithms.shards import LAST, PUSH
from lightning_async.algorithms.turn_service import TurnService
from lightning_async.arrival import Fate
from lightning_async.transport.mail import Carrier, Letter
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import Program, VirtualCluster
from tests.algorithms.turn_world import Member, consensus, sgd

N, SECONDS, STEP, BOUND = 4, 6.0, 0.1, 3.0
KNOBS: list[dict[str, Any]] = [{}, {"max_accumulate": 1}, {"max_accumulate": 8}, {"push": "delta"}]
EACH = 10  # seeds of a test, each with another fault, place and network


@dataclass
class Struck:
    """A run in which a holder is struck once, and what was seen of it.

    Attributes:
        victim: Who is struck.
        at: When it was struck.
        steps: When each member began a step.
        merged: When each shard was stepped by whom, whoever owned it.
        owners: By place: who gave its tokens.
        services: By member: what it serves.
    """

    cluster: VirtualCluster
    members: list[Member]
    victim: int
    at: float = 0.0
    steps: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    merged: dict[int, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    owners: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    services: dict[int, TurnService] = field(default_factory=dict)

    def holds(self, member: int) -> bool:
        """Whether it is this member's turn at any shard."""
        return any(t.holder == member for service in self.services.values() for t in service.turns.values())

    def served(self, service: TurnService, letter: Letter) -> None:
        """After a letter: exactly one holder for each place, and nobody else believes to be one."""
        m, me = letter.message, service._me
        self.services[me] = service
        if m.kind in (PUSH, LAST) and m.weight and m.reference in service.owned:
            self.merged[m.reference % 2**16].append((self.cluster.time, letter.peer))
        for at, turns in service.turns.items():
            self.owners[at].add(me)
            rights = turns.passed | ({turns.holder} - {None})
            living = service.owned[at].server.members
            believing = {r for r in living for x in self.members[r].algorithm.exchanges if x.token == at == x.place}
            assert believing <= rights, (at, believing, rights)
            server = service.owned[at].server
            assert turns.holder is not None or set(living) <= turns.passed | set(server.pausing) | server.unheard


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Struck]:
    """The run under way, which looks at every letter that is served."""
    runs: list[Struck] = []
    serve = TurnService.__call__

    def served(service: TurnService, letter: Letter) -> Any:
        answers = serve(service, letter)
        runs[-1].served(service, letter)
        return answers

    monkeypatch.setattr(TurnService, "__call__", served)
    return runs


def strike(watched: list[Struck], fault: str, seed: int) -> tuple[Struck, dict[int, Any]]:
    """Some member is struck in the first step after about a second that it begins as a holder."""
    chance = random.Random(seed)
    cluster = VirtualCluster(N, latency=chance.choice([0.001, 0.01, 0.03]), jitter=1.0, seed=seed)
    knobs = {**KNOBS[seed % len(KNOBS)], "mirror_every": chance.choice([1, None])}
    members = [Member(r, counting=True, make_optimizer=sgd(1.0), **knobs) for r in range(N)]
    run = Struck(cluster, members, chance.randrange(N))
    watched.append(run)
    seconds, after = chance.uniform(0.3, 4.0), chance.uniform(0.2, 1.2)

    def compute(member: Member, step: int) -> None:
        run.steps[member.rank].append(cluster.time)
        member.compute(step)
        if member.rank == run.victim and not run.at and cluster.time > after and run.holds(member.rank):
            run.at = cluster.time
            strike = {"kill": cluster.kill, "freeze": cluster.freeze, "cut": cluster.cut}[fault]
            strike(run.victim, **({} if fault == "kill" else {"seconds": seconds}))

    programs = {
        m.rank: m.life(cluster.carriers[m.rank], int(SECONDS / STEP), STEP, lambda step, m=m: compute(m, step))
        for m in members
    }
    trained = cluster.run(programs)
    assert run.at, "nobody was struck"
    assert set(trained) == set(range(N)) - ({run.victim} if fault == "kill" else set())
    return run, trained


@pytest.mark.few(1)
@pytest.mark.parametrize("first", range(0, 70, EACH))
@pytest.mark.parametrize("fault", ["kill", "freeze", "cut"])
def test_the_others_push_on_and_all_that_the_living_computed_is_applied(
    fault: str, first: int, watched: list[Struck]
) -> None:
    for seed in range(first, first + EACH):
        run, trained = strike(watched, fault, seed)
        assert all(len(owners) == 1 for owners in run.owners.values())  # of a shard and generation
        end = max(run.steps[min(trained)])
        for rank in set(trained) - {run.victim}:
            gaps = [b - a for a, b in pairwise(run.steps[rank])]
            assert max(gaps) <= BOUND, (seed, rank, max(gaps))
        for shard, merged in run.merged.items():
            times = [run.at, *(time for time, _ in merged if run.at < time < end), end]
            assert max(b - a for a, b in pairwise(times)) <= BOUND, (seed, shard)
        _all_applied(run, trained, fault)


def _all_applied(run: Struck, trained: dict[int, Any], fault: str) -> None:
    found = consensus(trained)
    for rank, one in trained.items():
        member = run.members[rank]
        lost = [a for a in one.arrivals if a.fate is Fate.LOST]
        applied = sum(a.samples for a in one.arrivals if a.fate is Fate.FOLDED)
        assert applied == len(member.algorithm.exchanges) * member.computed
        most = member.algorithm.mirror_every or ROUNDS * N  # pushes of a shard that were in no mirror
        assert len(lost) <= most * len(member.algorithm.exchanges)
        if fault != "kill":  # the dead change what a push counts
            at = torch.tensor([rank, 16 + rank])
            missing = 2 * member.computed - N * found[at].sum().item()
            assert -1e-9 <= missing <= sum(a.samples for a in lost) + 1e-9


def all_meet(cluster: VirtualCluster, steps: list[int], method: Any = None, **knobs: Any) -> set[int]:
    """Who meets at the end of so many steps each. Whoever has ended waits for the others before they meet, as a
    strategy's consensus does."""
    members = [Member(r, counting=True, make_optimizer=sgd(1.0), **knobs) for r in range(len(steps))]
    for member in members if method is not None else ():
        member.algorithm = method()

    def life(member: Member, carrier: Carrier) -> Program:
        algorithm, replica, rounds = member.algorithm, member.replica, Rounds(carrier)
        algorithm.begin(replica, carrier, UNIT, Rounds(carrier, channel=1))
        for step in range(1, 1 + steps[member.rank]):
            yield 0.02 * (1 + 0.1 * member.rank)
            member.compute(step)
            yield from algorithm.before_step(replica, carrier, step)
            member.optimizer.step()
            carrier.at(step)
            yield from algorithm.after_step(replica, carrier, step)
        yield from algorithm.stop(replica, carrier)
        for what in rounds.barrier():
            algorithm.attend(replica, carrier)
            yield what
        return (yield from algorithm.meet(replica, carrier))

    ends = cluster.run({c.me: life(members[c.me], c) for c in cluster.carriers})
    assert all(torch.equal(end, ends[min(ends)]) for end in ends.values())
    return set(ends)


STRICT, BOUNDED = {"token": "strict"}, {"max_accumulate": 4}


@pytest.mark.few(2)
@pytest.mark.parametrize("push", ["gradient", "delta"])
@pytest.mark.parametrize(
    ("turns", "fault"), [(STRICT, "kill"), (STRICT, "freeze"), (BOUNDED, "kill"), (BOUNDED, "freeze")], ids=str
)
def test_nobody_waits_for_the_turn_of_who_waits_in_a_meeting(turns: dict[str, Any], push: str, fault: str) -> None:
    """That member 0 does may have been known to the struck owner alone."""
    for victim, at in [(1, 0.3), (1, 0.6), (2, 0.6), (1, 0.8), (2, 0.8)]:
        cluster = VirtualCluster(3, latency=0.01, jitter=1.0, silence=0.3, limit=30.0)
        strike = {"kill": cluster.kill, "freeze": cluster.freeze}[fault]
        strike(victim, at=at, **({} if fault == "kill" else {"seconds": 0.8}))
        met = all_meet(cluster, [11, 30, 30], push=push, **turns)
        assert met == set(range(3)) - ({victim} if fault == "kill" else set())


@pytest.mark.parametrize(
    ("victim", "at", "steps", "latency", "seed", "push"),
    [
        (1, 0.38, [30, 15, 15, 30], 0.03, 11, "delta"),
        (0, 0.4, [8, 30, 15], 0.01, 18, "delta"),
        (2, 0.5, [30, 30, 30], 0.03, 139, "gradient"),
        (0, 0.61, [30, 30, 8], 0.03, 162, "delta"),
        (1, 1.19, [8, 8, 30, 30], 0.03, 175, "gradient"),
        (3, 0.26, [30, 30, 30, 8, 15], 0.03, 191, "gradient"),
    ],
)
def test_who_waits_for_a_token_hears_of_a_new_owner(
    victim: int, at: float, steps: list[int], latency: float, seed: int, push: str
) -> None:
    """Somebody is missed for a moment, and not by all."""
    cluster = VirtualCluster(len(steps), latency=latency, jitter=1.0, silence=0.3, limit=30.0, seed=seed)
    cluster.cut(victim, seconds=0.4, at=at)
    assert all_meet(cluster, steps, token="strict", push=push) == set(range(len(steps)))


@pytest.mark.few(4)
@pytest.mark.parametrize("steps", [[30, 30, 30, 30], [30, 30, 11, 30]], ids=str)
@pytest.mark.parametrize(
    "knobs",
    [
        {"push": "gradient"},
        {"push": "delta", **STRICT},
        {"push": "delta", **BOUNDED},
        {"push": "delta", "method": AsyncGlobal},
        {"push": "delta", "method": lambda: AsyncGlobal(on_late="wait", max_delay=8)},
    ],
    ids=["gradient", "strict", "bounded", "async", "wait"],
)
def test_an_heir_that_missed_nobody_and_has_no_mirror_hears_that_it_is_one(
    knobs: dict[str, Any], steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Member 0 alone misses member 1, whose mirrors member 2 has not; it may wait for the others at a meeting."""
    owned = ShardService._owned

    def without_mirrors(self: ShardService, letter: Letter) -> Any:
        if self._me == 2:
            self._mirrors.clear()
        return owned(self, letter)

    monkeypatch.setattr(ShardService, "_owned", without_mirrors)
    cluster = VirtualCluster(4, latency=0.005, silence=0.1, limit=20.0)
    cluster.cut(0, 1, seconds=0.12, at=0.3)
    assert all_meet(cluster, steps, **knobs) == set(range(4))
