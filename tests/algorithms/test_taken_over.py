"""A shard that another member took over is saved by who acts as its owner, once, and goes on as it was, to the bit: its
weights, version, books, tokens, what its rule or optimizer remembers, and what a law of shrinking asks for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.async_global import AsyncGlobal
from lightning_async.algorithms.cyclic_delay import CyclicDelay
from lightning_async.algorithms.images import unbundle
from lightning_async.algorithms.shard_server import version_of
from lightning_async.algorithms.shard_service import ShardService
from lightning_async.algorithms.shards import shard_of
from lightning_async.replica import Replica
from lightning_async.transport.mail import Carrier, Letter
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import Program, VirtualCluster
from tests.algorithms.legs import through_a_file

N, SIZE, STEPS, STEP = 5, 160, 60, 0.02
LONG = 60.0  # of a run of some two seconds

METHODS: dict[str, Any] = {
    "nesterov": lambda: AsyncGlobal(local_steps=2, outer="nesterov", outer_momentum=0.9, outer_lr=0.2),
    "delayed": lambda: AsyncGlobal(local_steps=2, outer="delayed_nesterov", outer_momentum=0.9, outer_lr=0.5),
    "adam": lambda: CyclicDelay(push="gradient", make_optimizer=lambda ps: optim.Adam(ps, 0.01)),
    "sgd": lambda: CyclicDelay(
        push="gradient", make_optimizer=lambda ps: optim.SGD(ps, 0.01, momentum=0.9), token="strict"
    ),
    "moves": CyclicDelay,
}

Frozen = Sequence[tuple[int, float, float]]
"""Who freezes, when, for how long."""


class Member:
    """One member, whose gradients are numbers of its own."""

    def __init__(self, method: str, rank: int, weights: Tensor | None = None) -> None:
        self.rank, self.algorithm = rank, METHODS[method]()
        self.algorithm.shrink = lambda arrival, correction, fresh: 1.0 if (fresh() or 1.0) > 0 else 0.5
        self.parameter = nn.Parameter(torch.zeros(SIZE) if weights is None else weights.clone())
        self.replica = Replica([self.parameter])

    def begin(self, carrier: Carrier) -> Rounds:
        rounds, make = Rounds(carrier), self.algorithm._service

        def kept(*arguments: Any, **options: Any) -> Any:
            self.service = make(*arguments, **options)
            return self.service

        self.algorithm._service = kept
        self.algorithm.begin(self.replica, carrier, UNIT, rounds)
        return rounds

    def train(self, carrier: Carrier, steps: range) -> Program:
        """These steps and a meeting: the consensus, and what is saved there."""
        for step in steps:
            yield STEP * (1 + 0.0618 * self.rank)
            self.parameter.grad = torch.randn(SIZE, generator=torch.Generator().manual_seed(1000 * self.rank + step))
            yield from self.algorithm.before_step(self.replica, carrier, step)
            if self.parameter.grad is not None:
                self.parameter.data.sub_(self.parameter.grad, alpha=0.01)
            carrier.at(step)
            yield from self.algorithm.after_step(self.replica, carrier, step)
        consensus = yield from self.algorithm.meet(self.replica, carrier)
        return consensus, through_a_file(self.algorithm.state_dict())


def remembered(members: Sequence[Member]) -> dict[int, list[Tensor]]:
    """What the rule or the optimizer of each shard knows, at whoever acts as its owner."""
    outers = {shard_of(at): one.server.outer for m in members for at, one in m.service.owned.items()}
    return {number: [*outer.tensors, torch.tensor([outer.count])] for number, outer in sorted(outers.items())}


def _soon(cluster: VirtualCluster, program: Program) -> Program:
    while True:
        try:
            what = next(program)
        except StopIteration as end:
            return end.value
        assert cluster.clock.time < LONG, f"{what}, for ever"
        yield what


def saved(
    method: str,
    frozen: Frozen = (),
    dead: int | None = None,
    steps: int = STEPS,
    begun: Callable[[VirtualCluster], object] = lambda cluster: None,
) -> tuple[Tensor, dict[int, dict[str, Any]], dict[int, list[Tensor]]]:
    """The consensus, each member's state and what is remembered at a meeting, at which whoever was frozen is back."""
    cluster = VirtualCluster(N, latency=0.005, jitter=1.0, silence=0.3, patience=30.0 if dead is None else 1.0)
    for rank, when, seconds in frozen:
        cluster.freeze(rank, seconds, at=when)
    if dead is not None:
        cluster.kill(dead, at=0.7)
    begun(cluster)
    members = [Member(method, rank) for rank in range(N)]

    def life(member: Member, carrier: Carrier) -> Program:
        rounds = member.begin(carrier)
        yield from rounds.barrier()
        return (yield from _soon(cluster, member.train(carrier, range(1, steps + 1))))

    ends = cluster.run({c.me: life(members[c.me], c) for c in cluster.carriers})
    first = next(iter(ends.values()))[0]
    assert all(torch.equal(consensus, first) for consensus, _ in ends.values())
    states = {rank: state for rank, (_, state) in ends.items()}
    return first, states, remembered([members[rank] for rank in states])


def served(states: dict[int, dict[str, Any]]) -> dict[int, Tensor]:
    """The image of each shard, which one member alone has saved."""
    found = [pair for state in states.values() for pair in unbundle(state["images"]).items()]
    assert sorted(number for number, _ in found) == list(range(N))
    return dict(found)


def resumed(method: str, consensus: Tensor, states: dict[int, dict[str, Any]]) -> dict[int, tuple[Any, Any, Any]]:
    """What each member of a new run has, right when all go on; the weights and the state at its next meeting."""
    cluster = VirtualCluster(N, latency=0.005, jitter=0.0, silence=0.3)

    def life(member: Member, carrier: Carrier) -> Program:
        rounds = member.begin(carrier)
        member.algorithm.load_state_dict(states[member.rank])
        yield from rounds.barrier()
        member.algorithm._images = yield from member.algorithm._own.images()
        begun = through_a_file(member.algorithm.state_dict())
        yield from rounds.barrier()
        return begun, *(yield from member.train(carrier, range(STEPS + 1, STEPS + 10)))

    ends: Any = cluster.run({c.me: life(Member(method, c.me, consensus), c) for c in cluster.carriers})
    return ends


def inherited(method: str, n: int, consensus: Tensor, states: dict[int, dict[str, Any]]) -> list[Member]:
    """The members of a run of so many that has begun where others had saved."""
    cluster, members = VirtualCluster(n, latency=0.005), [Member(method, rank, consensus) for rank in range(n)]

    def life(member: Member, carrier: Carrier) -> Program:
        member.algorithm.heritage = list(states.values())
        rounds = member.begin(carrier)
        yield from rounds.barrier()
        yield from member.algorithm._own.images()  # what its service was told has come

    cluster.run({c.me: life(members[c.me], c) for c in cluster.carriers})
    return members


CASES: list[Frozen] = [
    [(0, 0.3, 0.8)],
    [(4, 0.3, 0.8)],
    [(0, 0.3, 1.2), (1, 0.62, 0.8)],  # the heir's service takes over when it wakes: another member has done so
    [(0, 0.3, 1.2), (1, 0.65, 0.8)],
    [(0, 0.3, 1.2), (1, 0.7, 0.8)],
    [(0, 0.3, 0.5), (1, 0.9, 0.5)],
]


@pytest.mark.few(2)
@pytest.mark.parametrize("frozen", CASES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_who_took_a_shard_over_saves_it_and_goes_on_with_it(method: str, frozen: Frozen) -> None:
    consensus, states, _ = saved(method, frozen)
    images = served(states)
    assert any(number not in unbundle(states[number]["images"]) for number in range(N))  # something was taken over
    assert all(version_of(image) > 0 for image in images.values())
    ends = resumed(method, consensus, states)
    for rank, (begun, _, _) in ends.items():
        assert begun.keys() == states[rank].keys()
        for key, was in states[rank].items():
            assert torch.equal(begun[key], was) if isinstance(was, Tensor) else begun[key] == was, key
    assert all(
        version_of(image) > version_of(images[s]) for s, image in served({r: e[2] for r, e in ends.items()}).items()
    )
    assert all(torch.equal(end[1], ends[0][1]) for end in ends.values())


@pytest.mark.few(2)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("method", METHODS)
def test_a_meeting_ends_alike_for_all_whenever_owners_freeze(method: str, seed: int) -> None:
    """Also where one is missed between what it has answered and what all agree on."""
    chance = random.Random(seed)
    cases = [[(4, 0.625, 0.8)], [(1, 0.531, 0.8), (0, 0.446, 1.0)], [(1, 0.561, 0.8)]] if seed == 0 else []
    for _ in range(6):
        rank, at = chance.randrange(N), chance.uniform(0.4, 0.7)
        other = ((rank + chance.randrange(1, N)) % N, at + chance.uniform(-0.1, 0.2), chance.choice([0.4, 1.0]))
        cases.append([(rank, at, 0.8), *([other] if chance.random() < 0.5 else [])])
    for frozen in cases:
        _, states, _ = saved(method, frozen, steps=20)
        found = sorted(number for state in states.values() for number in unbundle(state["images"]))
        assert found == list(range(N)), frozen  # of none two: all would begin as its owner; of each one: nobody would
        assert len({tuple(state["owners"]) for state in states.values()}) == 1, frozen


@pytest.mark.few(2)
@pytest.mark.parametrize("owner", [2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_an_owner_that_is_succeeded_when_all_have_its_weights_saves_them(
    method: str, owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut off before the others hear its word; with that they agree on what they had of it, and it is none any
    more."""
    pulled, clusters, pullers = ShardService._pulled, list[VirtualCluster](), set[int]()

    def watched(self: ShardService, letter: Letter) -> Any:
        if self._me == owner and letter.peer not in pullers | {owner}:
            pullers.add(letter.peer)
            if len(pullers) == N - 1:
                clusters[-1].cut(owner, seconds=0.6, at=clusters[-1].time + 0.006 + 0.002 * len(clusters))
        return pulled(self, letter)

    monkeypatch.setattr(ShardService, "_pulled", watched)
    for _ in range(3):
        pullers.clear()
        consensus, states, _ = saved(method, steps=20, begun=clusters.append)
        images = served(states)
        assert len({tuple(state["owners"]) for state in states.values()}) == 1
    ends = {rank: end for rank, (_, _, end) in resumed(method, consensus, states).items()}
    assert all(version_of(image) > version_of(images[s]) for s, image in served(ends).items())


def joined(shards: dict[int, list[Tensor]]) -> list[Tensor]:
    """What is remembered of all elements, in their order."""
    return [torch.cat(parts) for parts in list(zip(*shards.values(), strict=True))[:-1]]


@pytest.mark.few(2)
@pytest.mark.parametrize("n", [2, 5, 7])
@pytest.mark.parametrize(("frozen", "dead"), [(CASES[2], None), ((), 0), ((), 3)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_other_members_lose_nothing_of_what_was_taken_over(
    method: str, frozen: Frozen, dead: int | None, n: int
) -> None:
    """Fewer, more, or all of those again of whom one had died before the save."""
    consensus, states, before = saved(method, frozen, dead)
    assert sorted(before) == list(range(N))
    members = inherited(method, n, consensus, states)
    after = remembered(members)
    assert sorted(after) == list(range(n))
    for one, other in zip(joined(after), joined(before), strict=True):
        assert torch.equal(one, other)
        assert one.abs().max() > 0
    if n == N and isinstance(members[0].algorithm, CyclicDelay):
        assert [shard[-1] for shard in after.values()] == [shard[-1] for shard in before.values()]  # of Adam: steps
    newest = max(max(state["versions"]) for state in states.values())
    assert {x.version for m in members for x in m.algorithm.exchanges} == {newest}
    assert {one.server.version for m in members for one in m.service.owned.values()} == {newest}


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["adam", "delayed"])
def test_of_a_shard_that_nobody_saved_nothing_is_remembered_and_of_the_others_all_is(method: str) -> None:
    """Its owner died when all had met."""
    consensus, states, before = saved(method)
    after = remembered(inherited(method, N, consensus, {rank: s for rank, s in states.items() if rank != 2}))
    for number in range(N):
        for one, other in zip(after[number][:-1], before[number][:-1], strict=True):
            assert torch.equal(one, other * (number != 2))
    if method == "adam":
        assert [int(after[s][-1]) for s in range(N)] == [int(before[s][-1]) * (s != 2) for s in range(N)]


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["sgd", "nesterov"])
def test_an_older_state_that_names_no_owners_is_of_the_first_ones(method: str) -> None:
    consensus, states, _ = saved(method)
    older = {rank: {key: s for key, s in state.items() if key != "owners"} for rank, state in states.items()}
    for rank, (begun, _, _) in resumed(method, consensus, older).items():
        assert torch.equal(begun["images"], states[rank]["images"])
        assert begun["owners"] == states[rank]["owners"] == list(range(N))
