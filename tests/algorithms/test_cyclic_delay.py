"""The laws of cyclic updates on the virtual cluster: what was computed is pushed once, by turns, and none too late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.cyclic_delay import CyclicDelay
from lightning_async.algorithms.training import Trained, train
from lightning_async.arrival import Arrival, Fate
from lightning_async.replica import Replica
from lightning_async.transport.mail import Carrier
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import Program, VirtualCluster
from tests.algorithms.legs import through_a_file

SIZE, STEP, LR = 48, 0.02, 0.05
TARGETS = torch.randn(32, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
TOKENS = ["skip", "strict"]


def sgd(lr: float = LR, **knobs: Any) -> Callable[[Any], optim.Optimizer]:
    return lambda parameters: optim.SGD(parameters, lr, **knobs)


class Member:
    """One member; its gradients are (weights - its target), or with `counting` 1 in its own coordinate."""

    def __init__(self, rank: int, *, counting: bool, **knobs: Any) -> None:
        self.rank, self.counting = rank, counting
        self.algorithm = CyclicDelay(**{"make_optimizer": sgd(), **knobs})
        self.parameter = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
        self.replica = Replica([self.parameter])
        self.computed = 0

    def compute(self, step: int) -> None:
        self.computed += 1
        gradient = torch.zeros(SIZE, dtype=torch.float64)
        if self.counting:
            gradient[self.rank] = gradient[16 + self.rank] = -1.0
        else:
            gradient = self.parameter.detach() - TARGETS[self.rank]
        self.parameter.grad = gradient


def go(
    speeds: Sequence[float],
    *,
    seconds: float = 1.0,
    counting: bool = False,
    faults: Callable[[VirtualCluster], None] = lambda cluster: None,
    cluster: dict[str, Any] | None = None,
    **knobs: Any,
) -> tuple[list[Member], dict[int, Trained]]:
    """Train for about so many seconds, and meet."""
    virtual = VirtualCluster(len(speeds), **{"silence": 0.5, "patience": 3.0, **(cluster or {})})
    faults(virtual)
    members = [Member(rank, counting=counting, **knobs) for rank in range(len(speeds))]
    programs = {
        member.rank: train(
            member.algorithm,
            member.replica,
            carrier,
            steps=max(1, int(seconds / (STEP * speeds[member.rank]))),
            take_step=member.compute,
            optimizer_step=optim.SGD([member.parameter], 1.0).step,  # it finds no gradients
            seconds=lambda me, step: STEP * speeds[me],
            rounds=Rounds(carrier),
        )
        for member, carrier in zip(members, virtual.carriers, strict=True)
    }
    return members, virtual.run(programs)


def consensus(trained: dict[int, Trained]) -> Tensor:
    """The same for all, to the bit."""
    found = [one.consensus for one in trained.values() if one.consensus is not None]
    assert found
    assert all(torch.equal(one, found[0]) for one in found)
    return found[0]


def arrivals(trained: dict[int, Trained]) -> list[Arrival]:
    """All pushes, in the order of the server (with one shard)."""
    return sorted((a for one in trained.values() for a in one.arrivals), key=lambda a: a.folded)


# -- what counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("knobs", [{}, {"shards": 1}, {"max_accumulate": 1}, {"max_accumulate": 3}], ids=str)
@pytest.mark.parametrize("speeds", [[1], [1, 1], [1, 1, 1, 4], [1, 2, 3], [1] * 7 + [8]], ids=str)
def test_the_sum_of_what_was_pushed_is_the_sum_of_what_was_computed(speeds: Any, knobs: Any, token: Any) -> None:
    cluster = {"latency": 0.005, "jitter": 1.0}
    members, trained = go(speeds, counting=True, token=token, make_optimizer=sgd(1.0), cluster=cluster, **knobs)
    moved = consensus(trained) * len(speeds)
    for member in members:
        for at in (member.rank, 16 + member.rank):
            assert moved[at].item() == pytest.approx(member.computed, rel=1e-12)


@pytest.mark.parametrize("token", TOKENS)
def test_latency_and_chance_lose_nothing(token: Any) -> None:
    for seed in range(6):
        cluster = {"latency": 0.03, "jitter": 3.0, "seed": seed}
        members, trained = go([1, 1.3, 2.1, 5], counting=True, token=token, make_optimizer=sgd(1.0), cluster=cluster)
        torch.testing.assert_close(
            consensus(trained)[:4] * 4, torch.tensor([float(m.computed) for m in members], dtype=torch.float64)
        )


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


@pytest.mark.parametrize("knobs", [{}, {"max_accumulate": 1}, {"max_accumulate": 2, "shards": 3}], ids=str)
@pytest.mark.parametrize("speeds", [[1, 1, 1, 1], [1, 1, 1, 4]], ids=str)
def test_strict_is_never_more_than_n_minus_1_late_whatever_waits(speeds: Any, knobs: Any) -> None:
    _, trained = go(speeds, token="strict", cluster={"latency": 0.01, "jitter": 2.0}, **knobs)
    assert max(a.delay for a in arrivals(trained)) == 3


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_strict_goes_round_and_round_and_no_push_is_more_than_n_minus_1_late(n: int) -> None:
    """At the end whoever has met is left out of the ring, which makes nothing later."""
    _, trained = go([1.0 + 0.5 * (r % 3) for r in range(n)], token="strict", shards=1)
    owners = sorted((a.folded, rank) for rank, one in trained.items() for a in one.arrivals)
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
    pushes = sorted((a.folded, rank, a) for rank, one in trained.items() for a in one.arrivals)
    weights, buffer = [np.zeros(SIZE)], np.zeros(SIZE)
    for version, rank, push in pushes:
        mu = 0.9 ** (push.samples / n)
        gradient = push.samples * (weights[push.base] - TARGETS[rank].numpy())
        buffer = mu * buffer + gradient / n
        weights.append(weights[version] - LR * (1 - mu) / (1 - 0.9) * buffer)
    np.testing.assert_allclose(consensus(trained)[:SIZE].numpy(), weights[-1], rtol=1e-9)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("make", [sgd(), sgd(momentum=0.9), lambda p: optim.AdamW(p, 0.01)])
def test_one_member_is_plain_training_to_the_bit(make: Any, shards: int, token: Any) -> None:
    _, trained = go([1], make_optimizer=make, shards=shards, token=token)
    parameter = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    optimizer = make([parameter])
    for _ in range(trained[0].steps):
        parameter.grad = parameter.detach() - TARGETS[0]
        optimizer.step()
    assert torch.equal(consensus(trained), parameter)


@pytest.mark.parametrize("token", TOKENS)
def test_it_goes_to_the_minimum_of_the_sum(token: Any) -> None:
    _, trained = go([1, 1, 1, 1], seconds=4.0, token=token)
    torch.testing.assert_close(consensus(trained), TARGETS[:4].mean(0), rtol=0, atol=0.06)


def test_skip_never_waits_between_meetings_and_fast_members_push_more_often_than_a_slow_one() -> None:
    _, trained = go([1, 1, 1, 16], seconds=4.0, shards=1)
    assert all(one.waits == 0 for one in trained.values())
    assert len(trained[0].arrivals) > 3 * len(trained[3].arrivals)


def test_gradients_that_are_not_finite_are_not_added_but_counted() -> None:
    members, trained = [], {}
    virtual = VirtualCluster(2)
    for carrier in virtual.carriers:
        member = Member(carrier.me, counting=True, make_optimizer=sgd(1.0))

        def compute(step: int, member: Member = member) -> None:
            member.compute(step)
            if step % 10 == 3 and member.parameter.grad is not None:
                member.parameter.grad[0] = float("nan")

        members.append(member)
        trained[carrier.me] = train(
            member.algorithm,
            member.replica,
            carrier,
            steps=40,
            take_step=compute,
            optimizer_step=lambda: None,
            seconds=lambda me, step: STEP,
            rounds=Rounds(carrier),
        )
    result = virtual.run(trained)
    assert [member.algorithm.refused for member in members] == [4, 4]
    assert (2 * consensus(result)[:2]).tolist() == [36.0, 36.0]


# -- faults ------------------------------------------------------------------------------------------------------------


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


def legs(member: Member, carrier: Carrier, count: int, *, anew: bool) -> Program:
    algorithm, step = member.algorithm, 0
    rounds = Rounds(carrier)
    algorithm.begin(member.replica, carrier, UNIT, rounds)
    for leg in range(count):
        if leg and anew:
            state = through_a_file(algorithm.state_dict())
            algorithm = CyclicDelay(make_optimizer=lambda p: optim.Adam(p, 0.05), token="strict", max_accumulate=1)
            algorithm._beginnings = leg
            algorithm.begin(member.replica, carrier, UNIT, rounds)
            algorithm.load_state_dict(state)
        if leg:
            algorithm.resume(member.replica, adopted=True)
        for _ in range(12):
            step += 1
            yield STEP
            member.compute(step)
            yield from algorithm.before_step(member.replica, carrier, step)
            carrier.at(step)
            yield from algorithm.after_step(member.replica, carrier, step)
        result = yield from algorithm.meet(member.replica, carrier)
    member.algorithm = algorithm
    return result


def test_a_new_algorithm_goes_on_from_a_state_as_the_old_one_would() -> None:
    ends = []
    for anew in (False, True):
        virtual = VirtualCluster(1)
        member = Member(
            0, counting=False, make_optimizer=lambda p: optim.Adam(p, 0.05), token="strict", max_accumulate=1
        )
        ends.append(virtual.run({0: legs(member, virtual.carriers[0], 3, anew=anew)})[0])
    assert torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("token", TOKENS)
def test_the_ring_goes_on_after_a_meeting(token: Any) -> None:
    virtual = VirtualCluster(3)
    members = [Member(r, counting=True, make_optimizer=sgd(1.0), token=token, max_accumulate=2) for r in range(3)]
    result = virtual.run({m.rank: legs(m, virtual.carriers[m.rank], 4, anew=False) for m in members})
    assert [round(v) for v in (3 * result[0][:3]).tolist()] == [48, 48, 48]


# -- bad input ---------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"token": "wait"}, "`token` must be one of 'skip', 'strict', got 'wait'"),
    ({"scale": "max"}, "`scale` must be one of 'sum', 'mean', 'delay', got 'max'"),
    ({"strength": 1.0}, "`strength` has no meaning with scale='sum'"),
    ({"max_accumulate": 0}, "`max_accumulate` must be an integer of at least 1, or None for no bound, got 0"),
    ({"max_delay": -1}, "`max_delay` must be an integer of at least 1"),
    ({"shards": True}, "`shards` must be an integer of at least 1"),
    ({"make_optimizer": lambda p: optim.LBFGS(p)}, "LBFGS cannot"),
]


@pytest.mark.parametrize(("knobs", "sentence"), WRONG)
def test_a_wrong_knob_says_what_is_wrong(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CyclicDelay(**{"make_optimizer": sgd(), **knobs})
