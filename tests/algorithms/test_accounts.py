"""Nothing is lost silently: what members hold, with what their ledgers say is missing, is the whole, whoever dies.

An account runs from the start, or from a meeting at which the consensus was adopted, to the next such meeting. Those
who go on from there have one unit each, also where somebody took mass along when it died before.
"""

from __future__ import annotations

import pytest
import torch

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.gossip import Gossip
from lightning_async.arrival import Fate
from lightning_async.transport.mail import Carrier
from tests.algorithms.legs import Member, run

# Death is declared after the last of its mail has arrived: what a dead member had sent counts.
WORLD = {"latency": 0.05, "jitter": 1.0, "silence": 0.3}


def mass(algorithm: Gossip) -> int:
    return algorithm.mass + algorithm.ledger.total_mass()


def account(members: list[Member]) -> torch.Tensor:
    """Sum of (mass x weights) and of what is missing."""
    total = torch.zeros(members[0].replica.numel, dtype=torch.float64)
    for member in members:
        total += member.replica.weights().double() * (member.algorithm.mass / UNIT)
        total += member.algorithm.ledger.total(member.replica.weights()).double()
    return total


@pytest.mark.parametrize("at", [0.05 * k for k in range(40)])
def test_mass_is_all_there_whoever_dies(at: float) -> None:
    members = run(
        [1, 2, 1, 4, 1],
        legs=(60,),
        mode="push_sum",
        max_delay=4,
        faults=lambda cluster: cluster.kill(2, at=at),
        cluster=WORLD,
    )
    assert sum(mass(member.algorithm) for member in members) == 5 * UNIT


@pytest.mark.parametrize("at", [*(0.1 * k for k in range(9)), *(0.9 + 0.02 * k for k in range(40)), 1.9, 2.1])
@pytest.mark.parametrize("mode", ["pairwise", "push_sum"])
def test_an_adopted_meeting_opens_the_accounts_anew(mode: str, at: float) -> None:
    """A death before, in the very middle of, or after the meeting; with lr 0 nothing but mail moves anybody."""
    members = run(
        [1, 2, 1, 4, 1],
        lr=0.0,
        mode=mode,
        max_delay=3,
        faults=lambda cluster: cluster.kill(2, at=at),
        cluster={**WORLD, "seed": round(100 * at)},
    )
    resumed = [member for member in members if member.resumed]
    assert len(resumed) >= 4
    assert sum(mass(member.algorithm) for member in resumed) == len(resumed) * UNIT
    first = [member.consensus[0] for member in resumed]
    assert all(torch.equal(first[0], other) for other in first)
    torch.testing.assert_close(account(resumed), len(resumed) * first[0].double(), rtol=1e-5, atol=1e-5)


def test_what_is_missing_stays_missing_where_each_keeps_its_own() -> None:
    held = []

    def look(member: Member, carrier: Carrier) -> None:
        held.append(mass(member.algorithm))

    members = run(
        [1, 1, 1, 4],
        legs=(40, 40),
        adopted=False,
        between=look,
        mode="push_sum",
        max_delay=2,
        faults=lambda cluster: cluster.kill(3, at=0.3),
        cluster=WORLD,
    )
    assert any(member.algorithm.ledger.mass for member in members)
    assert sum(held) + mass(members[3].algorithm) == 4 * UNIT
    assert sum(mass(member.algorithm) for member in members) == 4 * UNIT


def test_what_happened_stays_counted() -> None:
    counts: dict[int, int] = {}  # by rank: who leaves the meeting first depends on how long its exchange takes

    def look(member: Member, carrier: Carrier) -> None:
        counts[carrier.me] = sum(member.algorithm.ledger.count.values())

    members = run([1, 1, 4], legs=(40, 1), between=look, mode="push_sum", shrink=lambda arrival, correction, fresh: 0.5)
    for rank, member in enumerate(members):
        assert member.algorithm.ledger.count[Fate.SHRUNK] >= counts[rank] > 0


@pytest.mark.parametrize("seed", range(20))
def test_who_asked_a_member_that_died_asks_the_others(seed: int) -> None:
    """Also when the question was folded, and the answer died in the uplink of the dead."""
    members = run(
        [1.0] * 4,
        legs=(100,),
        mode="pairwise",
        faults=lambda cluster: cluster.kill(1, at=0.503 + 0.02 * seed),
        cluster={"latency": 0.001, "silence": 0.1, "bandwidth": 4e4, "seed": seed},
    )
    late = [a for a in members[2].arrivals + members[0].arrivals if a.base > 60 and {a.peer} <= {0, 2}]
    assert {a.peer for a in late} == {0, 2}
    assert all(1 not in member.algorithm.pending() for member in (members[0], members[2], members[3]))
