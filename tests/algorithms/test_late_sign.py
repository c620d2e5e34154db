"""What a rank sends counts once at each server, however late it is; weights after a round are the same everywhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.late_sign import LateSign
from lightning_async.algorithms.lazy_sign import LazySign
from lightning_async.algorithms.training import Trained, Training, train
from lightning_async.replica import Replica
from lightning_async.transport.mail import Carrier
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import VirtualCluster
from tests.algorithms.legs import through_a_file
from tests.transport.cluster_world import ClusterWorld

D, STEP = 96, 0.02
SMALL: dict[str, Any] = {"block": 48, "min_size": 8}


@dataclass
class Member:
    """One rank; each step's update is drawn anew, around a pull to zero."""

    rank: int
    algorithm: LazySign
    trained: Trained = field(default_factory=Trained)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(7)
        self.parameters = [nn.Parameter(torch.randn(n, generator=draw, dtype=torch.float64)) for n in (D, 3, 40)]
        self.replica = Replica(self.parameters)
        self.start = self.replica.weights()
        self.moved = torch.zeros_like(self.start)
        self.at: dict[int, Tensor] = {}
        self.bases: list[int] = []

    def compute(self, step: int) -> None:
        if self.late is not None and step > 1:
            self.at[self.late] = self.replica.weights()
            self.bases.append(self.late)
        noise = torch.randn(self.replica.numel, dtype=torch.float64, generator=self.draw(step))
        self.step = -0.05 * (self.replica.flat + noise)
        for p, part in zip(self.parameters, self.replica.parts(self.step), strict=True):
            p.grad = -part.clone()

    def draw(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.rank + step)

    @torch.no_grad()
    def move(self) -> None:
        before = self.replica.weights()
        for p in self.parameters:
            assert p.grad is not None
            p.sub_(p.grad)
        self.moved += self.replica.flat - before

    @property
    def late(self) -> int | None:
        """The round whose weights it has; None: alone, or all go in step."""
        return self.algorithm.late.round if hasattr(self.algorithm, "late") else None

    def life(self, carrier: Carrier, steps: int, factor: Callable[[int], float]) -> Training:
        began = carrier.now()
        self.trained = yield from train(
            self.algorithm,
            self.replica,
            carrier,
            steps=steps,
            take_step=self.compute,
            optimizer_step=self.move,
            seconds=lambda me, k: STEP * factor(k),
            rounds=Rounds(carrier),
        )
        self.seconds = self.trained.stepped - began
        return self.trained


def go(
    speeds: Sequence[float],
    *,
    seconds: float = 0.4,
    jitter: float = 0.0,
    faults: Callable[[VirtualCluster], None] = lambda cluster: None,
    cluster: dict[str, Any] | None = None,
    **knobs: Any,
) -> list[Member]:
    """Train for about so many seconds, and meet."""
    virtual = VirtualCluster(len(speeds), **{"patience": 5.0, "limit": 60.0, **(cluster or {})})
    faults(virtual)
    some = [Member(rank, LateSign(**{**SMALL, **knobs})) for rank in range(len(speeds))]
    chance = random.Random(1)
    lives = {}
    for one, carrier, speed in zip(some, virtual.carriers, speeds, strict=True):
        steps = max(1, int(seconds / (STEP * speed)))
        waits = [speed * chance.uniform(1.0, 1.0 + jitter) for _ in range(steps)]
        lives[one.rank] = one.life(carrier, steps, lambda k, waits=waits: waits[k - 1])  # type: ignore[misc]
    virtual.run(lives)
    return some


def check(some: Sequence[Member]) -> None:
    """All laws."""
    rounds: dict[int, Tensor] = {}
    for one in some:
        for number, weights in one.at.items():
            assert torch.equal(rounds.setdefault(number, weights), weights)
        assert torch.equal(one.replica.flat, some[0].replica.flat)
    held = torch.stack([one.algorithm.state_dict()["rest"] for one in some]).mean(0)
    for one in some:
        served = one.algorithm.state_dict()["exchange"]
        held[served["base"] : served["base"] + served["rest"].numel()] += served["rest"]
    exact = some[0].start + torch.stack([one.moved for one in some]).mean(0)
    torch.testing.assert_close(some[0].replica.flat + held, exact, rtol=1e-11, atol=1e-11)


# -- the laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.few(6)
@pytest.mark.parametrize("deadline", [0.0, 0.005, 0.03, 1.0])
@pytest.mark.parametrize("speeds", [[1, 1], [1, 4], [1, 1, 1, 4], [1, 1.3, 2.1, 5], [1, 1, 1, 1, 20]], ids=str)
def test_what_was_sent_counts_once_and_weights_are_the_same(speeds: Any, deadline: float) -> None:
    check(go(speeds, deadline=deadline))


@pytest.mark.few(0)
def test_whatever_the_wires_and_the_speeds() -> None:
    """Hundreds of schedules: speeds, latencies, freezes, deadlines and bounds are drawn; nobody is left waiting."""
    for seed in range(150):
        chance = random.Random(seed)
        n = chance.choice([2, 2, 3, 4])
        speeds = [chance.choice([1.0, 1.0, 1.2, 3.0, 9.0]) for _ in range(n)]

        def freeze(cluster: VirtualCluster, chance: random.Random = chance, n: int = n) -> None:
            for _ in range(chance.choice([0, 0, 2])):
                cluster.freeze(chance.randrange(n), chance.uniform(0.01, 0.6), at=chance.uniform(0.0, 0.3))

        check(
            go(
                speeds,
                seconds=chance.choice([0.06, 0.12, 0.24]),
                jitter=chance.choice([0.0, 0.2, 3.0]),
                faults=freeze,
                cluster={
                    "latency": chance.choice([0.0005, 0.004, 0.05]),
                    "jitter": chance.choice([0.1, 4.0]),
                    "seed": seed,
                },
                deadline=chance.choice([0.0, 0.001, 0.01, 0.05, 10.0]),
                max_skip=chance.choice([0, 1, 3, 7]),
            )
        )


@pytest.mark.parametrize("max_skip", [0, 1, 3])
def test_no_more_rounds_in_a_row_close_without_a_rank_than_max_skip(max_skip: int) -> None:
    some = go([1, 1, 1, 30], deadline=0.001, max_skip=max_skip, seconds=1.8)
    check(some)
    gaps = [b - a for a, b in zip(some[3].bases, some[3].bases[1:], strict=False)]
    assert max(gaps) == max_skip + 1
    assert some[3].algorithm.skipped > 0 or max_skip == 0


# -- the limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3])
def test_with_nobody_late_it_is_lazy_sign_by_slices_to_the_bit(n: int) -> None:
    ends = []
    makes: list[Callable[..., LazySign]] = [partial(LateSign, deadline=100.0), partial(LazySign, form="slices")]
    for make in makes:
        virtual = VirtualCluster(n)
        some = [Member(rank, make(**SMALL)) for rank in range(n)]
        virtual.run({m.rank: m.life(c, 30, lambda k: 1.0) for m, c in zip(some, virtual.carriers, strict=True)})
        ends.append(some[0].replica.weights())
        assert not any(one.algorithm.skipped for one in some)
    assert torch.equal(*ends)


def test_one_rank_is_the_optimizer_alone() -> None:
    (one,) = go([1.0], deadline=0.01)
    torch.testing.assert_close(one.replica.flat, one.start + one.moved, rtol=0, atol=1e-12)


def test_the_others_go_at_their_own_pace() -> None:
    """In 2 s of virtual time: 100 steps of a fast rank, 25 of the slow one; in lock-step it would be 25 of each."""
    some = go([1, 1, 1, 4], deadline=0.002, seconds=2.0)
    check(some)
    fast, slow = (one.seconds / one.trained.steps for one in (some[0], some[3]))
    assert fast < 1.5 * STEP
    assert slow < 1.3 * 4 * STEP
    assert some[3].algorithm.skipped > 40


def test_a_deadline_that_never_comes_waits_for_all() -> None:
    some = go([1, 1, 4], deadline=60.0)
    check(some)
    shared = min(one.trained.steps for one in some)
    assert [one.bases[: shared - 1] for one in some] == [list(range(1, shared))] * 3


# -- on real links -----------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("deadline", [0.0, 0.003, 30.0])
def test_on_real_links_it_counts_once_too(deadline: float) -> None:
    """In a random order of steps, in which rank 2 has its turn a fifth as often."""
    world, chance = ClusterWorld(3), random.Random(5)
    some = [Member(rank, LateSign(deadline=deadline, **SMALL)) for rank in range(3)]
    lives = {m.rank: m.life(world.carriers[m.rank], (40, 40, 8)[m.rank], lambda k: 1.0) for m in some}

    def step() -> bool:
        rank = chance.choice([r for r in lives for _ in range(1 if r == 2 else 5)])
        try:
            next(lives[rank])
        except StopIteration:
            del lives[rank]
        return not lives

    try:
        world.until(step, limit=60)
    finally:
        world.close()
    check(some)


# -- a state -----------------------------------------------------------------------------------------------------------


def test_a_new_object_with_the_old_ones_state_goes_on_to_the_bit() -> None:
    ends = []
    for anew in (False, True):
        virtual = VirtualCluster(3)
        some = [Member(rank, LateSign(deadline=0.004, **SMALL)) for rank in range(3)]

        def life(m: Member, carrier: Carrier, anew: bool = anew) -> Any:
            rounds = Rounds(carrier)
            m.algorithm.begin(m.replica, carrier, UNIT, rounds)
            for leg in range(3):
                if leg and anew:
                    state = through_a_file(m.algorithm.state_dict())
                    m.algorithm = LateSign(deadline=0.004, **SMALL)
                    m.algorithm.begin(m.replica, carrier, UNIT, rounds)
                    m.algorithm.load_state_dict(state)
                m.algorithm.resume(m.replica, adopted=True)
                for k in range(12 // (1 + m.rank)):
                    yield STEP * (1 + m.rank)
                    m.compute(100 * leg + k + 1)
                    m.move()
                    yield from m.algorithm.after_step(m.replica, carrier, k)
                yield from m.algorithm.meet(m.replica, carrier)

        virtual.run({m.rank: life(m, c) for m, c in zip(some, virtual.carriers, strict=True)})
        check_end(some)
        ends.append(some[0].replica.weights())
    assert torch.equal(*ends)


def check_end(some: Sequence[Member]) -> None:
    """Rounds begin at 1 again after a meeting, so weights are compared at the end alone."""
    for one in some:
        one.at = {}
    check(some)


def test_a_state_without_a_deadline_is_refused_in_words() -> None:
    carrier = VirtualCluster(2).carriers[0]
    member = Member(0, LateSign(deadline=1.0))
    member.algorithm.begin(member.replica, carrier, UNIT, Rounds(carrier))
    with pytest.raises(ValueError, match="does not fit lazy_sign with rule 'always, with a deadline'"):
        member.algorithm.load_state_dict({"method": "LazySign", "rule": "always"})


# -- those who die, and wrong input ------------------------------------------------------------------------------------


def test_a_rank_that_dies_stops_the_others_with_a_sentence() -> None:
    with pytest.raises(RuntimeError, match="rank 2 is gone, and lazy_sign cannot go on without it"):
        go([1, 1, 1], deadline=0.01, seconds=20.0, faults=lambda cluster: cluster.kill(2, at=0.3))


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"deadline": -1.0}, "`deadline` must be a number of seconds of at least 0, or None for no deadline, got -1.0"),
        ({"deadline": "1 s"}, "`deadline` must be a number of seconds"),
        ({"deadline": float("inf")}, "`deadline` must be a number of seconds"),
        ({"deadline": 1.0, "rule": "accumulate"}, "`deadline` goes with rule='always' alone, got 'accumulate'"),
        ({"deadline": 1.0, "compress": "gradient"}, "`deadline` goes with compress='update' alone, got 'gradient'"),
        ({"deadline": 1.0, "form": "gather"}, "`deadline` goes with form='auto' alone, got 'gather'"),
        ({"deadline": 1.0, "warm_up": 3}, "`deadline` goes with warm_up=0 alone, got 3"),
    ],
)
def test_a_wrong_knob_is_named(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LateSign(**knobs)
