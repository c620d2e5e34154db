"""The laws of cyclic updates on the virtual cluster: what was computed is pushed once, by turns, and none too late."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.async_global import AsyncGlobal
from lightning_async.algorithms.cyclic_delay import CyclicDelay
from lightning_async.algorithms.images import gathered
from lightning_async.algorithms.server_groups import Groups
from lightning_async.algorithms.server_step import ServerStep
from lightning_async.algorithms.shards import ANSWER, BID, LAST, PULL, PUSH, cut
from lightning_async.algorithms.turn_server import TurnServer
from lightning_async.arrival import Fate
from lightning_async.replica import Replica
from lightning_async.transport.mail import Carrier, Message
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import Program, VirtualCluster
from tests.algorithms.legs import through_a_file
from tests.algorithms.turn_world import (
    LR,
    PUSHES,
    SIZE,
    STEP,
    TARGETS,
    TOKENS,
    Member,
    arrivals,
    consensus,
    go,
    pushes,
    sgd,
)

# -- what counts -------------------------------------------------------------------------------------------------------


@pytest.mark.few(6)
@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("knobs", [{}, {"shards": 1}, {"max_accumulate": 1}, {"max_accumulate": 3}], ids=str)
@pytest.mark.parametrize("speeds", [[1], [1, 1], [1, 1, 1, 4], [1, 2, 3], [1] * 7 + [8]], ids=str)
def test_the_sum_of_what_was_pushed_is_the_sum_of_what_was_computed(
    speeds: Any, knobs: Any, token: Any, push: Any
) -> None:
    options = {"counting": True, "make_optimizer": sgd(1.0), "cluster": {"latency": 0.005, "jitter": 1.0}, **knobs}
    members, trained = go(speeds, token=token, push=push, **options)
    moved = consensus(trained) * len(speeds)
    for member in members:
        for at in (member.rank, 16 + member.rank):
            assert moved[at].item() == pytest.approx(member.computed, rel=1e-11)


@pytest.mark.parametrize("push", PUSHES)
def test_each_tells_of_its_own_pushes_with_its_own_rank(push: Any) -> None:
    _, trained = go([1, 1, 4], push=push)
    assert all(arrival.peer == rank for rank, arrival in pushes(trained))
    assert {arrival.owner for arrival in arrivals(trained)} == {0, 1, 2}


@pytest.mark.few(2)
@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize("token", TOKENS)
def test_latency_and_chance_lose_nothing(token: Any, push: Any) -> None:
    for seed in range(6):
        options = {"counting": True, "make_optimizer": sgd(1.0), "push": push}
        cluster = {"latency": 0.03, "jitter": 3.0, "seed": seed}
        members, trained = go([1, 1.3, 2.1, 5], token=token, cluster=cluster, **options)
        torch.testing.assert_close(
            consensus(trained)[:4] * 4, torch.tensor([float(m.computed) for m in members], dtype=torch.float64)
        )


def test_what_is_later_than_max_delay_is_shrunk_to_what_it_would_count_there() -> None:
    _, trained = go([1, 1, 1, 30], seconds=4.0, shards=1, max_delay=2)
    for a in arrivals(trained):
        excess = max(0, a.delay - 2 * 3)
        assert a.factor == pytest.approx(1.0 if excess <= 2 else (2 + 4) / (excess + 4), abs=1e-6)
        assert a.fate is (Fate.FOLDED if excess <= 2 else Fate.SHRUNK)
    assert any(a.fate is Fate.SHRUNK for a in trained[3].arrivals)


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_the_token_of_shard_b_begins_at_member_b(shards: int) -> None:
    """There are never more shards than members."""
    holders: list[tuple[int, int]] = []
    for carrier in VirtualCluster(3).carriers:
        algorithm = CyclicDelay(shards=shards)
        algorithm.begin(Replica([nn.Parameter(torch.zeros(96))]), carrier, UNIT, Rounds(carrier))
        holders += [(x.shard.number, carrier.me) for x in algorithm.exchanges if x.has_token]
    assert sorted(holders) == [(b, b) for b in range(min(shards, 3))]


class Counting:
    """A carrier that counts for each place what was asked and is not answered."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier, self.asked, self.most = carrier, Counter[int](), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._carrier, name)

    def post(self, peer: int, message: Message) -> bool:
        """See `Mail.post`."""
        gone = self._carrier.post(peer, message)
        self.asked[message.reference] += gone and message.kind in (PUSH, LAST, PULL)
        self.most = max(self.most, *self.asked.values())
        return gone

    def take(self, kind: int) -> Any:
        """See `Mail.take`."""
        letters = self._carrier.take(kind)
        for letter in letters if kind == ANSWER else ():
            self.asked[letter.message.reference] -= 1
        return letters


@pytest.mark.parametrize("method", [None, AsyncGlobal, lambda: AsyncGlobal(local_steps=3, wire="bf16")])
def test_one_exchange_of_each_shard_is_under_way_at_a_time(method: Any) -> None:
    """However long it is under way."""
    virtual = VirtualCluster(3, latency=3 * STEP, jitter=1.0)
    carriers, members = (
        [Counting(c) for c in virtual.carriers],
        [Member(r, counting=True, push="delta") for r in range(3)],
    )
    for member in members if method is not None else ():
        member.algorithm = method()
    virtual.run({m.rank: m.life(carriers[m.rank], 40, STEP * (1 + m.rank)) for m in members})  # type: ignore[arg-type]
    assert [carrier.most for carrier in carriers] == [1, 1, 1]
    assert all(not any(carrier.asked.values()) for carrier in carriers)


def test_the_delay_adapts_to_the_speed() -> None:
    _, trained = go([1, 1, 1, 4], token="strict", shards=1)
    fast, slow = ([a.samples for a in trained[rank].arrivals[2:-2]] for rank in (0, 3))
    assert set(slow) == {1}
    assert 3 <= sum(fast) / len(fast) <= 5


def test_with_scale_mean_each_push_counts_as_one_batch() -> None:
    _, trained = go([1, 1, 4], counting=True, shards=1, make_optimizer=sgd(1.0), scale="mean")
    pushes = torch.tensor([float(len(trained[rank].arrivals)) for rank in range(3)], dtype=torch.float64)
    torch.testing.assert_close(consensus(trained)[:3], pushes)


@pytest.mark.parametrize("token", TOKENS)
def test_with_scale_delay_only_what_is_later_than_in_a_healthy_run_counts_less(token: Any) -> None:
    knobs: dict[str, Any] = {"counting": True, "shards": 1, "make_optimizer": sgd(1.0), "scale": "delay"}
    members, trained = go([1, 1, 1, 30], token=token, seconds=4.0, **knobs)
    shares = [4 * consensus(trained)[r].item() / members[r].computed for r in range(4)]
    if token == "strict":
        assert shares == pytest.approx([1.0] * 4)
    else:
        assert max(a.delay for a in trained[3].arrivals) > 10
        assert shares[:3] == pytest.approx([1.0] * 3)
        assert shares[3] < 0.9


# -- strict ------------------------------------------------------------------------------------------------------------


@pytest.mark.few(3)
@pytest.mark.parametrize("knobs", [{}, {"max_accumulate": 1}, {"max_accumulate": 2, "shards": 3}], ids=str)
@pytest.mark.parametrize("speeds", [[1, 1, 1, 1], [1, 1, 1, 4]], ids=str)
def test_strict_is_never_more_than_n_minus_1_late_whatever_waits(speeds: Any, knobs: Any) -> None:
    _, trained = go(speeds, token="strict", cluster={"latency": 0.01, "jitter": 2.0}, **knobs)
    assert max(a.delay for a in arrivals(trained)) == 3


@pytest.mark.few(2)
@pytest.mark.parametrize("fault", ["kill", "freeze"])
@pytest.mark.parametrize("push", PUSHES)
def test_strict_is_never_more_than_n_minus_1_late_when_an_owner_dies_or_freezes(push: Any, fault: str) -> None:
    """Its heir goes on with the turn that the image names, and waits for whose turn it is to be heard."""
    for seed in range(8):
        at, cluster = 0.5 + 0.037 * seed, {"latency": 0.01 if seed % 2 else 0.002, "silence": 0.3, "seed": seed}
        knobs: dict[str, Any] = {"shards": 1, "token": "strict", "mirror_every": 1 if seed % 3 else None, "push": push}
        kill = fault == "kill"
        strike = (lambda c, at=at: c.kill(0, at=at)) if kill else (lambda c, at=at: c.freeze(0, 0.8, at=at))
        _, trained = go([1, 1.3, 1.7, 1.1], seconds=1.5, faults=strike, cluster=cluster, **knobs)
        assert all(a.delay <= 3 for a in arrivals(trained) if a.fate is not Fate.LOST)


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_strict_goes_round_and_round_and_no_push_is_more_than_n_minus_1_late(n: int) -> None:
    """At the end whoever has met is left out of the ring, which makes nothing later."""
    _, trained = go([1.0 + 0.5 * (r % 3) for r in range(n)], token="strict", shards=1)
    owners = [(a.folded, rank) for rank, a in pushes(trained)]
    assert [version for version, _ in owners] == list(range(len(owners)))  # versions count pushes
    assert [rank for _, rank in owners[: 3 * n]] == [k % n for k in range(3 * n)]
    late = [a.delay for a in arrivals(trained)]
    assert max(late) <= n - 1
    assert set(late[n : 3 * n]) == {n - 1}


def test_strict_with_a_bound_of_1_is_fixed_cyclic() -> None:
    _, trained = go([1, 1, 1, 4], token="strict", shards=1, max_accumulate=1)
    assert {a.samples for a in arrivals(trained)} == {1}


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_twin_in_numpy_makes_the_same_weights_of_the_order_of_pushes(n: int) -> None:
    _, trained = go([1, 1.5, 3, 2][:n], token="strict", shards=1, make_optimizer=sgd(momentum=0.9))
    weights, buffer = [np.zeros(SIZE)], np.zeros(SIZE)
    for rank, push in pushes(trained):
        mu = 0.9 ** (push.samples / n)
        gradient = push.samples * (weights[push.base] - TARGETS[rank].numpy())
        buffer = mu * buffer + gradient / n
        weights.append(weights[push.folded] - LR * (1 - mu) / (1 - 0.9) * buffer)
    np.testing.assert_allclose(consensus(trained)[:SIZE].numpy(), weights[-1], rtol=1e-9)


def test_a_bound_that_warms_up_grows_from_1() -> None:
    most, over = 6, 30
    _, trained = go([1, 1, 1, 8], seconds=4.0, shards=1, max_accumulate=most, warm_up=over)
    for one in trained.values():
        step, counts = 0, [a.samples for a in one.arrivals]
        for count in counts:
            step += count
            assert count <= (most if step >= over else 1 + (most - 1) * step // over)
    assert max(counts for one in trained.values() for counts in [a.samples for a in one.arrivals]) > 3


@pytest.mark.parametrize("n", [1, 2, 4])
def test_moves_a_twin_in_numpy_makes_the_same_weights_of_the_order_of_pushes(n: int) -> None:
    _, trained = go([1, 1.5, 3, 2][:n], token="strict", shards=1, push="delta")
    weights = [np.zeros(SIZE)]
    for rank, push in pushes(trained):
        here = weights[push.base]
        for _ in range(push.samples):
            here = here - LR * (here - TARGETS[rank].numpy())
        weights.append(weights[push.folded] + (here - weights[push.base]) / n)
    np.testing.assert_allclose(consensus(trained).numpy(), weights[-1], rtol=1e-9)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("make", [sgd(), sgd(momentum=0.9), lambda p: optim.AdamW(p, 0.01)])
def test_one_member_is_plain_training_to_the_bit(make: Any, shards: int, token: Any, push: Any) -> None:
    _, trained = go([1], make_optimizer=make, shards=shards, token=token, push=push)
    parameter = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    optimizer = make([parameter])
    for _ in range(trained[0].steps):
        parameter.grad = parameter.detach() - TARGETS[0]
        optimizer.step()
    assert torch.equal(consensus(trained), parameter)


@pytest.mark.few(2)
@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize("token", TOKENS)
def test_it_goes_to_the_minimum_of_the_sum(token: Any, push: Any) -> None:
    _, trained = go([1, 1, 1, 1], seconds=4.0, token=token, push=push)
    torch.testing.assert_close(consensus(trained), TARGETS[:4].mean(0), rtol=0, atol=0.06)


def test_skip_never_waits_between_meetings_and_fast_members_push_more_often_than_a_slow_one() -> None:
    _, trained = go([1, 1, 1, 16], seconds=4.0, shards=1)
    assert all(one.waits == 0 for one in trained.values())
    assert len(trained[0].arrivals) > 3 * len(trained[3].arrivals)


def test_gradients_that_are_not_finite_are_not_added_but_counted() -> None:
    members, trained, virtual = [], {}, VirtualCluster(2)
    for carrier in virtual.carriers:
        member = Member(carrier.me, counting=True, make_optimizer=sgd(1.0))

        def compute(step: int, member: Member = member) -> None:
            member.compute(step)
            if step % 10 == 3 and member.parameter.grad is not None:
                member.parameter.grad[0] = float("nan")

        members.append(member)
        trained[carrier.me] = member.life(carrier, 40, STEP, compute)
    result = virtual.run(trained)
    assert [member.algorithm.refused for member in members] == [4, 4]
    assert (2 * consensus(result)[:2]).tolist() == [36.0, 36.0]


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.few(4)
@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(("victim", "at"), [(0, 0.003), (3, 0.003), (0, 0.5), (1, 0.511), (3, 0.77)])
def test_a_killed_member_is_left_out_and_the_living_lose_no_more_than_they_say(
    token: Any, victim: int, at: float
) -> None:
    members, trained = go(
        [1, 1, 2, 1],
        counting=True,
        token=token,
        make_optimizer=sgd(1.0),
        mirror_every=1,
        seconds=2.0,
        faults=lambda cluster: cluster.kill(victim, at=at),
    )
    assert set(trained) == {0, 1, 2, 3} - {victim}
    consensus(trained)
    for rank, one in trained.items():
        lost = sum(a.samples for a in one.arrivals if a.fate in (Fate.LOST, Fate.REFUSED))
        counted = sum(a.samples for a in one.arrivals if a.fate == Fate.FOLDED)
        assert counted == len(members[rank].algorithm.exchanges) * members[rank].computed
        assert lost <= 40


@pytest.mark.few(2)
@pytest.mark.parametrize("fault", ["freeze", "cut"])
@pytest.mark.parametrize("victim", [0, 2])
def test_under_skip_the_others_push_on_while_one_is_frozen_or_cut_off(victim: int, fault: str) -> None:
    def faults(cluster: VirtualCluster) -> None:
        if fault == "freeze":
            cluster.freeze(victim, 1.5, at=0.7)
        else:
            cluster.cut(victim, seconds=1.5, at=0.7)

    members, trained = go([1, 1, 1, 1], seconds=4.0, max_accumulate=20, faults=faults)
    assert set(trained) == {0, 1, 2, 3}
    consensus(trained)
    assert all(member.computed == 200 for member in members)


@pytest.mark.parametrize("token", TOKENS)
def test_chance_kills_and_freezes_and_nobody_hangs(token: Any) -> None:
    chance = np.random.default_rng(7)
    for seed in range(5):
        times, victims = chance.uniform(0.01, 2.4, 3), chance.permutation(5)

        def faults(cluster: VirtualCluster, times: Any = times, victims: Any = victims) -> None:
            cluster.kill(int(victims[0]), at=float(times[0]))
            cluster.freeze(int(victims[1]), 1.2, at=float(times[1]))
            cluster.cut(int(victims[2]), seconds=1.0, at=float(times[2]))

        _, trained = go([1, 1, 2, 1, 3], token=token, faults=faults, mirror_every=2, cluster={"seed": seed})
        assert len(trained) >= 3
        consensus(trained)


# -- meetings ----------------------------------------------------------------------------------------------------------


def legs(member: Member, carrier: Carrier, count: int, *, anew: bool, fall: float = 1.0, **knobs: Any) -> Program:
    """So many meetings; with `anew` another object goes on from each. Behind each the rate falls, of which the servers
    hear when their own member has taken a step."""
    algorithm, step = member.algorithm, 0
    rounds = Rounds(carrier)
    algorithm.begin(member.replica, carrier, UNIT, rounds)
    for leg in range(count):
        if leg and anew:
            state = through_a_file(algorithm.state_dict())
            algorithm = CyclicDelay(**{"push": "gradient", **knobs})
            algorithm._beginnings = leg
            algorithm.optimizer = member.algorithm.optimizer
            algorithm.begin(member.replica, carrier, UNIT, rounds)
            algorithm.load_state_dict(state)
        yield from rounds.barrier()
        if leg:
            algorithm.resume(member.replica, adopted=True)
        for _ in range(12):
            step += 1
            yield STEP * (1 + 0.618 * member.rank)  # no two at the same time, which chance would put in order
            member.compute(step)
            yield from algorithm.before_step(member.replica, carrier, step)
            carrier.at(step)
            yield from algorithm.after_step(member.replica, carrier, step)
        result = yield from algorithm.meet(member.replica, carrier)
        member.replica.stand_in(result)
        member.replica.stay()
        yield from rounds.barrier()
        if algorithm.optimizer is not None:
            algorithm.optimizer.param_groups[0]["lr"] *= fall
    member.algorithm = algorithm
    return result


ADAM: dict[str, Any] = {"make_optimizer": lambda parameters: optim.Adam(parameters, 0.05)}


@pytest.mark.few(2)
@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize(("n", "most"), [(2, 2), (3, 2), (4, 3)])
@pytest.mark.parametrize("batches", [2.5, 1, 4, 10])
def test_members_that_keep_to_a_bound_do_not_wait_for_each_other_in_a_circle(
    n: int, most: int, batches: float, push: str
) -> None:
    """A push takes so many batches to arrive: meanwhile its sender is passed over, and others have turns of which they
    make nothing, since they wait for the turn of another shard."""
    cluster = {"latency": batches * STEP, "jitter": 0.0, "silence": 2.0, "limit": 60.0}
    members, trained = go([1] * n, max_accumulate=most, push=push, counting=True, seconds=2.0, cluster=cluster)
    assert set(trained) == set(range(n))
    for member in members:
        applied = sum(a.samples for a in trained[member.rank].arrivals if a.fate is Fate.FOLDED)
        assert applied == len(member.algorithm.exchanges) * member.computed


@pytest.mark.few(1)
@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize("first", range(0, 40, 10))
def test_whatever_the_speeds_and_the_network_nobody_waits_for_ever(first: int, push: str) -> None:
    for seed in range(first, first + 10):
        chance = random.Random(seed)
        n, most = chance.choice([2, 3, 4, 6]), chance.choice([1, 2, 3, 5])
        speeds = [chance.choice([1, 1, 1.3, 2, 4]) for _ in range(n)]
        knobs = {"shards": chance.choice([None, 1, 3]), "mirror_every": chance.choice([1, None])}
        cluster = {"latency": chance.uniform(0, 6) * STEP, "jitter": chance.choice([0.0, 1.0]), "seed": seed}
        members, trained = go(
            speeds,
            max_accumulate=most,
            push=push,
            counting=True,
            cluster={**cluster, "silence": 2.0, "limit": 60.0},
            **knobs,
        )
        for member in members:
            applied = sum(a.samples for a in trained[member.rank].arrivals if a.fate is Fate.FOLDED)
            assert applied == len(member.algorithm.exchanges) * member.computed, seed


@pytest.mark.few(4)
@pytest.mark.parametrize("knobs", [{"max_accumulate": 1}, {}, {"scale": "delay", "shards": 1}], ids=str)
@pytest.mark.parametrize("n", [3, 1])
@pytest.mark.parametrize("token", TOKENS)
def test_a_new_algorithm_goes_on_from_a_state_as_the_old_one_would(token: Any, n: int, knobs: dict[str, Any]) -> None:
    """Mirrors go to and fro at other times, so there are none. Whose turn comes behind a second meeting is chance."""
    ends, options, count = [], {**knobs, "token": token, "mirror_every": 10**6}, 3 if n == 1 else 2
    for anew in (False, True):
        virtual = VirtualCluster(n, latency=0.003, jitter=0.0)
        members = [Member(rank, counting=False, **ADAM, **options) for rank in range(n)]
        lives = {
            m.rank: legs(m, virtual.carriers[m.rank], count, anew=anew, fall=0.5, **ADAM, **options) for m in members
        }
        ends.append(virtual.run(lives)[0])
    assert torch.equal(ends[0], ends[1])


class Listening:
    """A carrier that counts the bids that leave behind the last push, and those of who is idle."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier, self.late, self.idle, self._last = carrier, 0, 0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._carrier, name)

    def post(self, peer: int, message: Message) -> bool:
        """See `Mail.post`."""
        self._last = self._last or message.kind == LAST
        self.late += self._last and message.kind == BID
        self.idle += message.kind == BID and message.weight
        return self._carrier.post(peer, message)


def test_who_has_nothing_left_at_a_meeting_says_of_no_batch_that_it_waits() -> None:
    """Its word might come when all have met, and shorten the turn of another."""
    virtual = VirtualCluster(3)
    members = [Member(rank, counting=False, shards=1) for rank in range(3)]
    carriers = [Listening(carrier) for carrier in virtual.carriers]
    virtual.run({m.rank: m.life(carriers[m.rank], 20, STEP * (1 + m.rank)) for m in members})  # type: ignore[arg-type]
    assert [carrier.late for carrier in carriers] == [0, 0, 0]


@pytest.mark.parametrize("n", [2, 3])
def test_only_who_goes_on_waiting_says_that_it_is_idle_in_its_turn(n: int) -> None:
    """Who computes next has something to push then: it would give its turn away. Here who waits looks at its mail only
    every two steps, and finds several letters there."""
    virtual, said = VirtualCluster(n, latency=2 * STEP, jitter=0.0, limit=60.0), list[str | float]()

    def watched(member: Member, carrier: Listening) -> Program:
        bids, program = 0, member.life(carrier, 30, STEP)  # type: ignore[arg-type]
        while True:
            try:
                what = next(program)
            except StopIteration as end:
                return end.value
            said.extend([what] * (carrier.idle - bids))
            bids = carrier.idle
            yield 2 * STEP if isinstance(what, str) else what

    members = [Member(rank, counting=False, max_accumulate=1) for rank in range(n)]
    virtual.run({m.rank: watched(m, Listening(virtual.carriers[m.rank])) for m in members})
    assert said
    assert [what for what in said if not isinstance(what, str)] == []


@pytest.mark.parametrize("token", TOKENS)
def test_the_ring_goes_on_after_a_meeting(token: Any) -> None:
    virtual = VirtualCluster(3)
    members = [Member(r, counting=True, make_optimizer=sgd(1.0), token=token, max_accumulate=2) for r in range(3)]
    result = virtual.run({m.rank: legs(m, virtual.carriers[m.rank], 4, anew=False) for m in members})
    assert [round(v) for v in (3 * result[0][:3]).tolist()] == [48, 48, 48]


def _remembered(members: list[Member]) -> list[Tensor]:
    """What the server's optimizers remember, of all elements, and how far they are; as the members have saved it."""
    images = gathered(member.algorithm.state_dict()["images"] for member in members)
    service, rules = members[0].algorithm, []
    for number, shard in enumerate(cut(members[0].replica.numel, len(images))):
        groups = Groups(optim.AdamW([members[0].parameter]), members[0].replica.places)
        server = TurnServer(
            replace(
                service.rules, make_outer=lambda part, groups=groups, begin=shard.begin: ServerStep(part, groups, begin)
            ),
            torch.zeros(shard.end - shard.begin, dtype=torch.float64),
            tuple(range(len(members))),
        )
        server.become(images[number])
        rules.append(server.outer)
    assert {rule.count for rule in rules} or not rules
    tensors = [torch.cat(parts) for parts in zip(*(rule.tensors for rule in rules), strict=True)]
    return [*tensors, torch.tensor([max(rule.count for rule in rules)])]


@pytest.mark.parametrize("n", [1, 3, 5])
def test_other_members_go_on_with_what_the_servers_optimizers_remember(n: int) -> None:
    make: Any = lambda p: optim.AdamW(p, 0.01)  # noqa: E731
    old, trained = go([1, 1], make_optimizer=make)
    states = [through_a_file(member.algorithm.state_dict()) for member in old]
    new, virtual = [Member(rank, counting=False, make_optimizer=make) for rank in range(n)], VirtualCluster(n)

    def life(member: Member, carrier: Carrier) -> Program:
        member.replica.go_to(consensus(trained))
        member.algorithm.heritage = states
        member.algorithm.begin(member.replica, carrier, UNIT, Rounds(carrier))
        return (yield from member.algorithm.meet(member.replica, carrier))

    ends = virtual.run({m.rank: life(m, virtual.carriers[m.rank]) for m in new})
    assert all(torch.equal(end, consensus(trained)) for end in ends.values())
    for mine, theirs in zip(_remembered(new), _remembered(old), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.abs().max() > 0
    assert len({member.algorithm.exchanges[0].version for member in new}) == 1


# -- bad input ---------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"token": "wait"}, "`token` must be one of 'skip', 'strict', got 'wait'"),
    ({"scale": "max"}, "`scale` must be one of 'sum', 'mean', 'delay', got 'max'"),
    ({"push": "weights"}, "`push` must be one of 'gradient', 'delta', got 'weights'"),
    ({"strength": 1.0}, "`strength` has no meaning with scale='sum'"),
    ({"compensation": "dcasgd"}, "`compensation` must be one of 'none', 'lr', 'dc', got 'dcasgd'"),
    ({"compensation_strength": 1.0}, "`compensation_strength` has no meaning with compensation='none'"),
    (
        {"compensation": "lr", "compensation_strength": True},
        "`compensation_strength` must be a number of at least 0, got True",
    ),
    (
        {"compensation": "dc", "push": "delta", "make_optimizer": None},
        "compensation='dc' is for gradients, .* give push='gradient' too, or use compensation='lr'",
    ),
    ({"warm_up": -1, "max_accumulate": 2}, "`warm_up` must be an integer of at least 0, got -1"),
    ({"warm_up": 5}, "`warm_up` needs a `max_accumulate` to grow to"),
    ({"max_accumulate": 0}, "`max_accumulate` must be an integer of at least 1, or None for no bound, got 0"),
    ({"max_delay": -1}, "`max_delay` must be an integer of at least 1"),
    ({"shards": True}, "`shards` must be an integer of at least 1"),
    ({"make_optimizer": lambda p: optim.LBFGS(p)}, "LBFGS cannot"),
]


@pytest.mark.parametrize(("knobs", "sentence"), WRONG)
def test_a_wrong_knob_says_what_is_wrong(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CyclicDelay(**{"make_optimizer": sgd(), **knobs})
