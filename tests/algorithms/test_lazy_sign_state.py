"""A run that goes on from a state is the run that went on, to the bit; among other ranks nothing held back is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.late_sign import LateSign
from lightning_async.algorithms.lazy_sign import LazySign
from lightning_async.replica import Replica
from lightning_async.transport.mail import Carrier
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.virtual import Program, VirtualCluster
from tests.algorithms.legs import through_a_file
from tests.algorithms.sign_world import Member, members, quadratic

RULES = ["always", "accumulate", "periodic", "paper", "innovation"]
D, LR = 96, 0.1
KNOBS: dict[str, Any] = {"block": 16, "min_size": 0, "history": 5, "max_skip": 3, "threshold": 0.6}


def live(
    some: list[Member], legs: tuple[range, ...], *, anew: bool = False, **knobs: Any
) -> list[list[dict[str, Any]]]:
    """Legs with a meeting at the end of each; the states at the meetings. `anew`: each leg has a new algorithm."""
    gradient, _ = quadratic(len(some), D, noise=0.3)
    virtual = VirtualCluster(len(some))
    states: list[list[dict[str, Any]]] = [[] for _ in some]

    def life(m: Member, carrier: Any) -> Program:
        rounds = Rounds(carrier)
        m.algorithm.begin(m.replica, carrier, UNIT, rounds)
        for number, leg in enumerate(legs):
            if number:
                if anew:
                    m.algorithm = LazySign(**{**KNOBS, **knobs})
                    m.algorithm.begin(m.replica, carrier, UNIT, rounds)
                    m.algorithm.load_state_dict(through_a_file(states[m.rank][-1]))
                m.algorithm.resume(m.replica, adopted=True)
            for k in leg:
                yield 0.02
                flat = gradient(m.rank, k, m.flat())
                for p, g in zip(m.parameters, flat.split([p.numel() for p in m.parameters]), strict=True):
                    p.grad = g
                yield from m.algorithm.before_step(m.replica, carrier, k)
                m.optimizer.step()
                carrier.at(k)
                yield from m.algorithm.after_step(m.replica, carrier, k)
            consensus = yield from m.algorithm.meet(m.replica, carrier)
            assert torch.equal(consensus, m.replica.flat)
            states[m.rank].append(m.algorithm.state_dict())

    virtual.run({c.me: life(some[c.me], c) for c in virtual.carriers})
    return states


@pytest.mark.few(6)
@pytest.mark.parametrize("form", ["slices", "gather"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compress", ["update", "gradient"])
def test_a_new_object_with_the_old_ones_state_goes_on_to_the_bit(rule: str, form: str, compress: str) -> None:
    knobs = {"rule": rule, "form": form, "compress": compress, "ahead": 2}
    legs = (range(1, 14), range(14, 16), range(16, 30))
    ends = []
    for anew in (False, True):
        some = members(3, [(D,)], **KNOBS, **knobs)
        states = live(some, legs, anew=anew, **knobs)
        ends.append((some[0].flat(), states[1][-1]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert_equal(ends[0][1], ends[1][1])


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert (type(one), one) == (type(other), other)


def held(states: list[dict[str, Any]]) -> Tensor:
    """The mean of what the ranks hold back, with what their servers do."""
    total = sum(state["rest"] for state in states) / len(states)
    assert isinstance(total, Tensor)
    for state in states:
        if "rest" in state["exchange"]:
            base, rest = state["exchange"]["base"], state["exchange"]["rest"]
            total[base : base + rest.numel()] += rest
    return total


@pytest.mark.parametrize("rule", ["always", "accumulate", "periodic"])
@pytest.mark.parametrize("new", [1, 2, 3, 5])
def test_another_number_of_ranks_holds_back_the_same(rule: str, new: int) -> None:
    inherited(rule, rule, new)


@pytest.mark.parametrize(("rule", "other"), [("always", "accumulate"), ("accumulate", "always"), ("paper", "periodic")])
def test_another_number_of_ranks_with_another_rule_holds_back_the_same(rule: str, other: str) -> None:
    inherited(rule, other, 3)


@pytest.mark.parametrize("other", [{"rule": "innovation"}, {"compress": "gradient"}])
def test_what_was_held_back_of_other_units_is_not_taken_over(other: dict[str, Any]) -> None:
    for before, after in (({}, other), (other, {})):
        (heir, *_), states = heirs(2, 3, KNOBS | before, KNOBS | after)
        assert any(state["rest"].any() for state in states)
        assert not heir.algorithm.state_dict()["rest"].any()


def inherited(rule: str, other: str, new: int) -> None:
    some, states = heirs(4, new, {**KNOBS, "rule": rule, "form": "slices"}, {**KNOBS, "rule": other})
    assert held(states).any()
    if new == 1:
        torch.testing.assert_close(some[0].flat() - members(1, [(D,)])[0].flat(), held(states)[:D])
    else:
        torch.testing.assert_close(held([heir.algorithm.state_dict() for heir in some]), held(states))


def heirs(
    old: int, new: int, before: dict[str, Any], after: dict[str, Any]
) -> tuple[list[Member], list[dict[str, Any]]]:
    """Ranks that take over from others, and what these had."""
    states = [own[-1] for own in live(members(old, [(D,)], **before), (range(1, 24),))]
    some, carriers = members(new, [(D,)], **after), VirtualCluster(new).carriers
    for heir, carrier in zip(some, carriers, strict=True):
        heir.algorithm.begin(heir.replica, carrier, UNIT, Rounds(carrier))
        heir.algorithm.inherit(heir.replica, states[heir.rank :: new], world=old)
    return some, states


OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "slices, gather": ({"form": "slices"}, {"form": "gather"}),
    "gather, slices": ({"form": "gather"}, {"form": "slices"}),
    "other sizes": ({"form": "slices"}, {"form": "slices", "min_size": 50}),
    "other blocks": ({"form": "gather"}, {"form": "gather", "block": 8, "scale": "tensor"}),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", OTHERWISE)
@pytest.mark.parametrize("rule", RULES)
def test_a_state_that_was_cut_otherwise_is_taken_over(rule: str, kind: str) -> None:
    """In another form, or in other sheets: what the ranks and their servers hold back stays, and the run goes on."""
    before, after = OTHERWISE[kind]
    shapes: list[tuple[int]] = [(40,), (D - 40,)]
    some, heirs = (members(3, shapes, **{**KNOBS, "rule": rule, **knobs}) for knobs in (before, after))
    states = [own[-1] for own in live(some, (range(1, 24),), rule=rule, **before)]
    for one, carrier, state in zip(heirs, VirtualCluster(3).carriers, states, strict=True):
        one.algorithm.begin(one.replica, carrier, UNIT, Rounds(carrier))
        one.algorithm.load_state_dict(through_a_file(state))
    now = [one.algorithm.state_dict() for one in heirs]
    torch.testing.assert_close(held(now), held(states), rtol=1e-12, atol=1e-14)
    if rule == "innovation":
        torch.testing.assert_close(now[0]["common"], -held(states), rtol=1e-10, atol=1e-12)
    assert now[0]["round"] == states[0]["round"]
    resumed = members(3, shapes, **{**KNOBS, "rule": rule, **before})
    live(resumed, (range(1, 24), range(24, 40)), anew=True, rule=rule, **after)
    assert all(torch.equal(one.flat(), resumed[0].flat()) for one in resumed)


def test_a_state_that_was_cut_otherwise_is_taken_over_with_a_deadline() -> None:
    (one, *_) = thaw(3, THAWING["deadline"])
    state = one.states[-1]
    assert state["exchange"]["rest"].abs().max() > 0
    carrier, other = VirtualCluster(3).carriers[0], Thawing(0, LateSign(deadline=0.004, block=16, min_size=50))
    other.backbone.requires_grad_(True)
    other.replica = Replica(other.parameters)
    other.algorithm.begin(other.replica, carrier, UNIT, Rounds(carrier))
    other.algorithm.load_state_dict(through_a_file(state))
    now = other.algorithm.state_dict()
    assert not now["exchange"]["rest"].any()
    begin, served = state["exchange"]["base"], state["exchange"]["rest"]
    state["rest"][begin : begin + served.numel()].add_(served, alpha=3)
    torch.testing.assert_close(now["rest"], state["rest"])


def test_a_state_of_another_rule_is_refused_in_words() -> None:
    (carrier, _), (member, _) = VirtualCluster(2).carriers, members(2, [(D,)], **KNOBS)
    member.algorithm.begin(member.replica, carrier, UNIT, Rounds(carrier))
    with pytest.raises(ValueError, match="the state of LazySign with rule 'paper' does not fit lazy_sign with rule"):
        member.algorithm.load_state_dict({"method": "LazySign", "rule": "paper"})
    with pytest.raises(ValueError, match="the state of another method"):
        member.algorithm.load_state_dict({})
    other = "update" if member.algorithm.compress == "gradient" else "gradient"
    with pytest.raises(ValueError, match=f"compress='{other}' does not fit"):
        member.algorithm.load_state_dict({**member.algorithm.state_dict(), "compress": other})


# -- what is trained changes -------------------------------------------------------------------------------------------

LEGS = (14, 2, 9)
"""Rounds that leave something held back by the clock of `periodic`; fewer than `history`; and to the end."""


@dataclass
class Thawing:
    """A rank with a backbone of 40 numbers that thaws after the first leg, before a head that is always trained."""

    rank: int
    algorithm: LazySign
    replaces: bool = False

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(7)
        self.backbone, self.head = (nn.Parameter(torch.randn(n, generator=draw, dtype=torch.float64)) for n in (40, D))
        self.backbone.requires_grad_(False)
        self.replica = Replica(self.parameters)
        self.start, self.moved = self.all(), torch.zeros(40 + D, dtype=torch.float64)
        self.states: list[dict[str, Any]] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.backbone, self.head]

    def all(self) -> Tensor:
        return torch.cat([p.detach().clone() for p in self.parameters])

    @torch.no_grad()
    def step(self, k: int) -> None:
        """A pull to somewhere else on each rank, and noise."""
        before, draw = self.all(), torch.Generator().manual_seed(1000 * self.rank + k)
        for p in self.parameters:
            noise = torch.randn(p.numel(), generator=draw, dtype=torch.float64)
            p.grad = (0.1 * (p - self.rank) + 0.05 * noise) if p.requires_grad else None
            if p.grad is not None and self.algorithm.compress == "update":
                p.sub_(p.grad)
        self.moved += self.all() - before

    def change(self, carrier: Carrier, rounds: Rounds) -> None:
        self.states.append(self.algorithm.state_dict())
        old = self.replica
        if self.replaces:
            self.head = nn.Parameter(self.head.detach().clone())
        self.backbone.requires_grad_(True)
        self.replica = Replica(self.parameters)
        self.algorithm.renew(old, self.replica, carrier, UNIT, rounds)
        self.states.append(self.algorithm.state_dict())


def thaw(n: int, new: Callable[[], LazySign], *, anew: bool = False, replaces: bool = False) -> list[Thawing]:
    """Three legs, a meeting behind each; behind the first the backbone thaws, behind the second `anew` resumes."""
    virtual = VirtualCluster(n)
    some = [Thawing(rank, new(), replaces) for rank in range(n)]

    def life(one: Thawing, carrier: Any) -> Program:
        rounds, done = Rounds(carrier), 0
        one.algorithm.begin(one.replica, carrier, UNIT, rounds)
        for leg, steps in enumerate(LEGS):
            if leg == 1:
                one.change(carrier, rounds)
                yield from rounds.barrier()
            elif leg == 2 and anew:
                state = through_a_file(one.algorithm.state_dict())
                one.algorithm = new()
                one.algorithm.begin(one.replica, carrier, UNIT, rounds)
                one.algorithm.load_state_dict(state)
            one.algorithm.resume(one.replica, adopted=True)
            late = 1 + one.rank if isinstance(one.algorithm, LateSign) else 1
            for k in range(done + 1, done + 1 + steps // late):
                yield 0.02 * late
                one.step(k)
                yield from one.algorithm.before_step(one.replica, carrier, k)
                carrier.at(k)
                yield from one.algorithm.after_step(one.replica, carrier, k)
                done = k
            consensus = yield from one.algorithm.meet(one.replica, carrier)
            assert torch.equal(consensus, one.replica.flat)
        one.states.append(one.algorithm.state_dict())

    virtual.run({c.me: life(some[c.me], c) for c in virtual.carriers})
    assert all(torch.equal(one.all(), some[0].all()) for one in some)
    return some


THAWING: dict[str, Callable[[], LazySign]] = {
    **{
        f"{rule}, {form}": partial(LazySign, **{**KNOBS, "rule": rule, "form": form, "warm_up": 3})
        for rule in RULES
        for form in ("slices", "gather")
    },
    "deadline": partial(LateSign, deadline=0.004, block=16, min_size=0),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", THAWING)
def test_what_is_held_back_stays_so_where_more_is_trained(kind: str) -> None:
    some = thaw(3, THAWING[kind])
    before, after, end = (held([one.states[i] for one in some]) for i in range(3))
    assert before.abs().min() > 0
    torch.testing.assert_close(after[40:], before, rtol=1e-12, atol=1e-14)
    assert not after[:40].any()
    if kind.startswith("innovation"):
        for one in some:  # what all have of all ranks is what these have sent, less what the servers hold
            torch.testing.assert_close(one.states[1]["common"], -after, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(one.states[2]["common"], -end, rtol=1e-10, atol=1e-12)
    elif not kind.startswith("paper"):
        exact = some[0].start + torch.stack([one.moved for one in some]).mean(0)
        torch.testing.assert_close(some[0].all() + end, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", THAWING)
def test_a_run_that_goes_on_behind_the_thaw_does_so_to_the_bit(kind: str) -> None:
    """Also where the rounds that are sent by all, since nobody knows the others' last ones, are not over."""
    one, other = (thaw(3, THAWING[kind], anew=anew) for anew in (False, True))
    assert torch.equal(one[1].all(), other[1].all())
    assert_equal(one[1].states[-1], other[1].states[-1])


def test_whole_numbers_travel_once_in_a_run() -> None:
    """A warm-up that was over when the backbone thawed does not begin again: signs leave something at home."""
    (one, *_) = thaw(3, partial(LazySign, **KNOBS, warm_up=LEGS[0]))
    assert not one.states[0]["rest"].any()
    assert one.states[0]["round"] == one.states[1]["round"] == LEGS[0]
    (one, *_) = thaw(3, partial(LazySign, **KNOBS, warm_up=sum(LEGS) - 1))
    assert one.states[-1]["rest"].any()
    (one, *_) = thaw(3, partial(LazySign, **KNOBS, warm_up=sum(LEGS)))
    assert not one.states[-1]["rest"].any()


def test_a_layer_that_is_replaced_begins_with_nothing_held_back() -> None:
    for one in thaw(2, partial(LazySign, **KNOBS), replaces=True):
        assert one.states[0]["rest"].any()
        assert not one.states[1]["rest"].any()


def test_another_fit_of_the_same_object_begins_with_nothing_held_back() -> None:
    virtual = VirtualCluster(2)
    algorithm, other = LazySign(**KNOBS), Thawing(0, LazySign(**KNOBS))
    for _ in range(2):
        algorithm.begin(other.replica, virtual.carriers[0], UNIT, Rounds(virtual.carriers[0]))
        assert not algorithm.state_dict()["rest"].any()
        assert algorithm.state_dict()["round"] == 0
        algorithm.signs.rest.vector.fill_(1.0)
        algorithm.signs.number = 5
