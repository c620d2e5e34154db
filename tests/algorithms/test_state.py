"""A run that goes on from a state is the run that went on, to the bit; there are no letters in a state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_async.algorithms.algorithm import UNIT, Algorithm
from lightning_async.algorithms.gossip import gossip
from lightning_async.transport.mail import Carrier
from lightning_async.transport.virtual import Program, VirtualCluster
from tests.algorithms.legs import SIZE, Member, run, through_a_file

MODES = ["pairwise", "push_sum", "sync", "none"]


def three_legs(mode: str, *, exchanged: bool = False, **options: Any) -> list[Member]:
    """A world in which masses, turns, rounds and ledgers are all used."""

    def between(member: Member, carrier: Carrier) -> None:
        if exchanged:
            member.take_another_algorithm(carrier)

    return run(
        [1.0] * 5 if mode == "sync" else [1, 1, 1, 1, 4],
        legs=(50, 1, 40),  # in the second one nobody, or hardly anybody, writes
        between=between,
        mode=mode,
        shrink=lambda arrival, correction, fresh: 0.5 if (fresh() or 1.0) > 0 else 0.25,
        period=3,
        max_delay=4,
        topology="exponential",
        cluster={"latency": 0.03, "jitter": 1.0, "seed": 5},
        **options,
    )


@pytest.mark.parametrize("adopted", [True, False])
@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_a_new_object_with_the_old_ones_state_goes_on_to_the_bit(mode: str, wire: str, adopted: bool) -> None:
    through = three_legs(mode, wire=wire, adopted=adopted)
    exchanged = three_legs(mode, wire=wire, adopted=adopted, exchanged=True)
    for one, other in zip(through, exchanged, strict=True):
        assert one.arrivals == other.arrivals
        assert all(torch.equal(a, b) for a, b in zip(one.consensus, other.consensus, strict=True))
        assert torch.equal(one.replica.weights(), other.replica.weights())
        assert_equal(one.algorithm.state_dict(), other.algorithm.state_dict())
    assert mode == "none" or all(member.arrivals for member in through)


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert (type(one), one) == (type(other), other)


@pytest.mark.parametrize("mode", MODES)
def test_a_state_goes_through_a_file_of_tensors_and_primitives(mode: str) -> None:
    for member in three_legs(mode, adopted=False):
        state = member.algorithm.state_dict()
        assert_equal(state, through_a_file(state))


def test_the_world_above_leaves_something_to_remember() -> None:
    pairwise = [m.algorithm.state_dict() for m in three_legs("pairwise", adopted=False)]
    push_sum = [m.algorithm.state_dict() for m in three_legs("push_sum", adopted=False)]
    assert all(state["turn"] > 0 for state in pairwise + push_sum)
    assert any(state["mass"] != UNIT for state in push_sum)
    assert all(any(state["ledger"]["moved"] for state in states) for states in (pairwise, push_sum))
    rounds = {member.algorithm.state_dict()["round"] for member in three_legs("sync")}
    assert rounds == {1 + 91 // 3 + 2}  # one a meeting


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mode", ["pairwise", "push_sum", "sync"])
def test_at_a_meeting_nothing_is_open_and_nothing_in_flight(mode: str, seed: int) -> None:
    """What arrives afterwards was launched afterwards: in a later step, or, in lock-step, in a later round."""
    met: dict[int, int] = {}
    speeds = [1.0] * 4 if mode == "sync" else [1.0, 2.0, 1.0, 4.0]

    def look(member: Member, carrier: Carrier) -> None:
        met[member.rank] = len(member.arrivals)
        assert not [*member.algorithm.pending(), *vars(member.algorithm).get("_early", ())]

    members = run(
        speeds,
        legs=(20, 12),
        adopted=bool(seed % 2),
        between=look,
        mode=mode,
        cluster={"latency": 0.004, "jitter": 20.0, "seed": seed, "bandwidth": 2e4},
    )
    for member in members:
        after = member.arrivals[met[member.rank] :]
        assert after
        assert all(a.base > (21 if mode == "sync" else 20 / speeds[a.peer]) for a in after)


@pytest.mark.parametrize("mode", ["pairwise", "push_sum", "sync"])
def test_a_state_goes_on_among_new_carriers(mode: str) -> None:
    """Steps go on counting, and a letter of the new run is not as late as the new links make it look."""
    n, meeting = 4, 30
    members = [Member(rank, lr=0.0, mode=mode, max_delay=6) for rank in range(n)]

    def first(member: Member, carrier: Carrier) -> Program:
        member.begin(carrier)
        yield from member.leg(carrier, range(1, meeting + 1))

    def second(member: Member, carrier: Carrier, state: dict[str, Any]) -> Program:
        member.begin(carrier)
        member.algorithm.load_state_dict(state)
        member.resume(adopted=False)
        yield from member.leg(carrier, range(meeting + 1, 2 * meeting + 1))

    one, other = VirtualCluster(n, latency=0.03), VirtualCluster(n, latency=0.03, seed=1)
    one.run({c.me: first(members[c.me], c) for c in one.carriers})
    states = [through_a_file(member.algorithm.state_dict()) for member in members]
    for member in members:
        member.arrivals.clear()
    other.run({c.me: second(members[c.me], c, states[c.me]) for c in other.carriers})
    for member in members:
        assert member.arrivals
        assert all(0 <= a.delay <= 6 and a.factor == 1 for a in member.arrivals)
        torch.testing.assert_close(member.consensus[0], member.consensus[1], rtol=1e-5, atol=1e-5)


def test_a_state_of_another_mode_is_refused_in_words() -> None:
    (member,) = run([1.0], mode="push_sum")
    carrier = VirtualCluster(1).carriers[0]
    pairwise = gossip("pairwise")
    pairwise.begin(member.replica, carrier, UNIT, member.rounds)
    with pytest.raises(ValueError, match="the state of PushSum does not fit Pairwise: go on with the mode"):
        pairwise.load_state_dict(member.algorithm.state_dict())
    with pytest.raises(ValueError, match="the state of another method does not fit Pairwise"):
        pairwise.load_state_dict({})


def test_who_holds_nothing_between_meetings_needs_no_state() -> None:
    still = type("Still", (Algorithm,), dict.fromkeys(Algorithm.__abstractmethods__))()
    assert still.state_dict() == {}
    still.load_state_dict({})
    with pytest.raises(ValueError, match="Still holds nothing between meetings"):
        still.load_state_dict({"method": "Pairwise"})


def test_the_control_has_no_scratch() -> None:
    (member,) = run([1.0], mode="none")
    held = [value for value in vars(member.algorithm).values() if isinstance(value, torch.Tensor)]
    assert [tensor.numel() for tensor in held if tensor.numel() >= SIZE] == []
