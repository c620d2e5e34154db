"""A run that goes on from a state is the run that went on, to the bit; among other ranks nothing held back is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.lazy_sign import LazySign
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
                m.parameters[0].grad = gradient(m.rank, k, m.flat())
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
    old = 4
    some = members(old, [(D,)], rule=rule, form="slices", **KNOBS)
    states = [own[-1] for own in live(some, (range(1, 24),), rule=rule, form="slices")]
    heirs = members(new, [(D,)], rule=rule, **KNOBS)
    virtual = VirtualCluster(new)
    for heir, carrier in zip(heirs, virtual.carriers, strict=True):
        before = heir.flat()
        heir.algorithm.begin(heir.replica, carrier, UNIT, Rounds(carrier))
        heir.algorithm.inherit(heir.replica, states[heir.rank :: new], world=old)
        if new == 1:
            torch.testing.assert_close(heir.flat() - before, held(states)[:D])
    if new > 1:
        torch.testing.assert_close(held([heir.algorithm.state_dict() for heir in heirs]), held(states))


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
