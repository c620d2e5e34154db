"""The laws of gossip on the virtual cluster: sums are kept, samples count equally, nobody waits, late is late."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.gossip import Mode, gossip
from lightning_async.arrival import Fate
from lightning_async.transport.virtual import VirtualCluster
from tests.algorithms.one_hot import Outcome, run

ASYNC = ["pairwise", "push_sum"]
GENERATOR = torch.Generator().manual_seed(7)
STARTS = torch.randn(64, 64, generator=GENERATOR)


def start(rank: int) -> Tensor:
    return STARTS[rank, :64].clone()


def sum_and_ledger(outcome: Outcome) -> Tensor:
    """Sum of (mass x weights) of all members, plus what the ledgers say is missing."""
    total = torch.zeros(outcome.replicas[0].numel, dtype=torch.float64)
    for algorithm, replica in zip(outcome.algorithms, outcome.replicas, strict=True):
        total += replica.weights().double() * (algorithm.mass / UNIT)
        total += algorithm.ledger.total(replica.weights()).double()
    return total


def expected_sum(n: int) -> Tensor:
    flat = torch.zeros(16 * n, dtype=torch.float64)
    flat[::16] = STARTS[:n, :n].double().sum(0)
    return flat


@pytest.mark.few(4)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", [*ASYNC, "sync", "none"])
def test_with_lr_0_the_weighted_mean_is_constant(mode: str, wire: str, n: int) -> None:
    speeds = [1.0] * n if mode == "sync" else [1.0] * (n - 1) + [4.0]
    outcome = run(
        speeds,
        seconds=3,
        lr=0.0,
        start=start,
        mode=mode,
        wire=wire,
        cluster={"latency": 0.03, "jitter": 1.0, "seed": n},
    )
    torch.testing.assert_close(sum_and_ledger(outcome), expected_sum(n), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outcome.consensus.double(), expected_sum(n) / n, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("topology", ["ring", "exponential"])
@pytest.mark.parametrize("mode", ASYNC)
@pytest.mark.parametrize("slow", [1.0, 4.0, 10.0])
def test_one_sample_moves_the_consensus_equally_whatever_the_speed(mode: str, topology: str, slow: float) -> None:
    outcome = run([1, 1, 1, slow], mode=mode, topology=topology, cluster={"latency": 0.01, "jitter": 1.0})
    torch.testing.assert_close(outcome.sample_weights, torch.ones(4), rtol=1e-3, atol=0)


def test_one_sample_moves_the_consensus_equally_whatever_the_batch_size() -> None:
    """A step of a member with batches of 3 is worth three of one with batches of 1."""
    outcome = run([1, 1, 4], mode="pairwise", masses=[3 * UNIT, UNIT, 2 * UNIT])
    torch.testing.assert_close(outcome.sample_weights, torch.tensor([3.0, 1.0, 2.0]) * 3 / 6, rtol=1e-3, atol=0)


@pytest.mark.parametrize("mode", ASYNC)
def test_nobody_waits_for_the_slow_the_frozen_or_the_dead(mode: str) -> None:
    def faults(cluster: object) -> None:
        cluster.freeze(0, 1.0, at=0.5)  # type: ignore[attr-defined]
        cluster.kill(2, at=1.0)  # type: ignore[attr-defined]
        cluster.cut(1, seconds=0.7, at=1.5)  # type: ignore[attr-defined]

    outcome = run([1, 1, 1, 10, 1], mode=mode, faults=faults, cluster={"silence": 0.3})
    assert set(outcome.trained) == {0, 1, 3, 4}
    assert all(t.waits == 0 for t in outcome.trained.values())
    for r in (1, 3, 4):  # between meetings they take exactly the time that computing takes; member 0 was frozen
        offset = outcome.cluster.carriers[r].now() - outcome.cluster.time
        assert outcome.trained[r].stepped - offset == pytest.approx(outcome.steps[r] * 0.02 * [1, 1, 1, 10, 1][r])


@pytest.mark.parametrize("mode", [*ASYNC, "sync", "none"])
def test_nobody_waits_for_who_comes_late_and_a_meeting_does(mode: str) -> None:
    """It joins after longer than patience, and its samples count like all others."""
    outcome = run(
        [1] * 4, mode=mode, faults=lambda cluster: cluster.join(1, at=3.0), cluster={"silence": 0.3, "patience": 1.0}
    )
    assert outcome.cluster.time >= 3.0 + 4.0
    assert all(member.consensus is not None for member in outcome.trained.values())
    torch.testing.assert_close(outcome.sample_weights, torch.ones(4), rtol=1e-3, atol=0)
    if mode != "sync":
        assert all(t.waits == 0 for t in outcome.trained.values())
        for r, t in outcome.trained.items():
            start = outcome.cluster.carriers[r].now() - outcome.cluster.time + (3.0 if r == 1 else 0.0)
            assert t.stepped - start == pytest.approx(4.0)


@pytest.mark.parametrize("mode", ASYNC)
@pytest.mark.parametrize("topology", ["ring", "exponential"])
def test_the_others_agree_meanwhile(mode: str, topology: str) -> None:
    """Whoever would talk to a member that has not come talks to others."""

    def faults(cluster: VirtualCluster) -> None:
        for late in (3, 4):
            cluster.join(late, at=20.0)

    outcome = run([1] * 8, seconds=12, mode=mode, topology=topology, lr=0.0, start=start, faults=faults, meets=False)
    others = torch.stack([outcome.replicas[r].weights() for r in (0, 1, 2, 5, 6, 7)])
    assert others.std(0).max() < 1e-3


def test_mass_is_an_integer_and_is_all_there() -> None:
    outcome = run([1, 2, 3, 4, 5], mode="push_sum", max_delay=3, cluster={"latency": 0.05, "jitter": 1.0})
    held = sum(a.mass for a in outcome.algorithms)
    missing = sum(a.ledger.total_mass() for a in outcome.algorithms)
    assert all(isinstance(a.mass, int) for a in outcome.algorithms)
    assert held + missing == 5 * UNIT


@pytest.mark.parametrize("mode", ASYNC)
def test_the_bound_on_delays_is_enforced_and_nothing_is_lost_by_it(mode: str) -> None:
    outcome = run(
        [1, 1, 1, 8], mode=mode, max_delay=3, lr=0.0, start=start, cluster={"latency": 0.02, "jitter": 1.0, "seed": 3}
    )
    arrivals = [a for t in outcome.trained.values() for a in t.arrivals]
    folded = [a.delay for a in arrivals if a.fate is Fate.FOLDED]
    assert any(a.fate is Fate.REFUSED for a in arrivals)
    assert folded
    assert max(folded) <= 3
    torch.testing.assert_close(sum_and_ledger(outcome), expected_sum(4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ASYNC)
def test_what_a_shrink_withholds_is_in_the_ledger(mode: str) -> None:
    outcome = run([1, 1, 4], mode=mode, lr=0.0, start=start, shrink=lambda arrival, correction, fresh: 0.5)
    assert all(a.factor == 0.5 for t in outcome.trained.values() for a in t.arrivals)
    torch.testing.assert_close(sum_and_ledger(outcome), expected_sum(3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ASYNC)
def test_a_shrink_of_1_changes_nothing_to_the_bit(mode: str) -> None:
    plain = run([1, 1, 4], mode=mode, start=start)
    shrunk = run([1, 1, 4], mode=mode, start=start, shrink=lambda arrival, correction, fresh: 1.0)
    assert torch.equal(plain.consensus, shrunk.consensus)


@pytest.mark.parametrize("mode", [*ASYNC, "sync", "none"])
def test_one_member_is_the_optimizer_alone_to_the_bit(mode: str) -> None:
    outcome = run([1], mode=mode, lr=0.1, start=start)
    expected = start(0)[:1]
    for _ in range(outcome.steps[0]):
        expected += 0.1
    assert torch.equal(outcome.consensus[:1], expected)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_sync_is_d_psgd(n: int) -> None:
    """Against a twin in NumPy: X <- W X - lr G, with W 1/3 to each neighbour (1/2 for a pair)."""
    steps = 20
    outcome = run([1] * n, seconds=0.02 * steps, mode="sync", start=start, lr=0.05)
    weights = np.zeros((n, n))
    for i in range(n):
        for j in {(i - 1) % n, (i + 1) % n}:
            weights[i, j] = 1 / 2 if n == 2 else 1 / 3
        weights[i, i] = 1 - weights[i].sum()
    x = STARTS[:n, :n].double().numpy().copy()
    for _ in range(outcome.steps[0]):
        x = weights @ x + 0.05 * np.eye(n)
    got = torch.stack([r.weights()[::16] for r in outcome.replicas]).double().numpy()
    np.testing.assert_allclose(got, x, atol=1e-5)


def test_sync_with_unequal_numbers_of_steps_stops_with_a_sentence() -> None:
    with pytest.raises(RuntimeError, match=r"no more batches.*balance='equal'"):
        run([1, 1, 2], mode="sync")


@pytest.mark.parametrize("seed", range(40))
def test_the_law_holds_whatever_the_bound_the_network_and_the_speeds(seed: int) -> None:
    chance = random.Random(seed)
    speeds = [chance.choice([1, 1, 2, 4]) for _ in range(chance.randint(2, 6))]

    def faults(cluster: VirtualCluster) -> None:
        for late in random.Random(seed).sample(range(len(speeds)), seed % 3):
            cluster.join(late, at=3 * chance.random())

    outcome = run(
        speeds,
        seconds=2,
        lr=0.0,
        start=start,
        mode=chance.choice(ASYNC),
        topology=chance.choice(["ring", "exponential"]),
        max_delay=chance.randint(1, 5),
        faults=faults,
        cluster={"latency": chance.choice([0.001, 0.03, 0.1]), "jitter": 1.0, "seed": seed, "bandwidth": 5e4},
    )
    torch.testing.assert_close(sum_and_ledger(outcome), expected_sum(len(speeds)), rtol=1e-5, atol=1e-5)


@pytest.mark.few(5)
@pytest.mark.parametrize("mode", ASYNC)
@pytest.mark.parametrize("topology", ["ring", "exponential"])
@pytest.mark.parametrize("steps_away", [1, 2, 5, 20])
def test_a_slow_network_makes_agreement_slow_and_nothing_worse(mode: str, topology: str, steps_away: int) -> None:
    outcome = run(
        [1] * 16,
        seconds=5,
        lr=0.0,
        start=start,
        mode=mode,
        topology=topology,
        cluster={"latency": 0.02 * steps_away, "jitter": 0.5},
    )
    spread = torch.stack([r.weights()[::16] for r in outcome.replicas]) - outcome.consensus[::16]
    assert spread.square().mean().sqrt() < 0.5 * STARTS.std()


@pytest.mark.few(4)
@pytest.mark.parametrize("topology", ["ring", "exponential"])
@pytest.mark.parametrize("n", [6, 7, 8, 16])
def test_sync_contracts_on_every_topology(topology: str, n: int) -> None:
    outcome = run([1] * n, seconds=2, mode="sync", topology=topology, lr=0.0, start=start)
    spread = torch.stack([r.weights()[::16] for r in outcome.replicas]) - outcome.consensus[::16]
    assert spread.square().mean().sqrt() < 0.1 * STARTS.std()


def test_a_death_stops_sync_with_a_sentence() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 is gone, and mode='sync' cannot go on without it.*mode='pairwise'"):
        run([1] * 4, mode="sync", faults=lambda cluster: cluster.kill(1, at=1.0), cluster={"silence": 0.3})


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", ASYNC)
@pytest.mark.parametrize("n", [3, 4, 8, 16])
def test_replicas_agree_in_the_end(n: int, mode: str) -> None:
    outcome = run([1] * n, seconds=12.0, mode=mode, lr=0.0, start=start)
    spread = torch.stack([r.weights() for r in outcome.replicas]) - outcome.consensus
    assert spread.square().mean().sqrt() < 1e-3 * STARTS.std()


@pytest.mark.parametrize(("mode", "limit"), [("pairwise", 16), ("sync", 16), ("push_sum", 8), ("none", None)])
def test_a_ring_that_is_too_long_is_warned_of(mode: Mode, limit: int | None) -> None:
    assert gossip(mode).warning(limit or 1000) is None
    assert gossip(mode, topology="exponential").warning(1000) is None
    if limit is not None:
        assert f"{limit + 1} members on a ring agree slowly" in str(gossip(mode).warning(limit + 1))


KNOBS = [
    ({"mode": "broadcast"}, "`mode` must be one of 'pairwise', 'push_sum', 'sync', 'none', got 'broadcast'"),
    ({"period": 0}, "`period` must be an integer of at least 1, got 0"),
    ({"period": 1.5}, "`period` must be an integer of at least 1, got 1.5"),
    ({"period": True}, "`period` must be an integer of at least 1, got True"),
    ({"max_delay": 0}, "`max_delay` must be an integer of at least 1, or None for no bound, got 0"),
    ({"wire": "fp8"}, "`wire` must be 'fp32' or 'bf16', got 'fp8'"),
    ({"topology": "star"}, "`topology` must be 'ring' or 'exponential', got 'star'"),
    ({"mixing": 0.6}, r"`mixing` must be above 0 and at most 0.5 .*, got 0.6"),
    ({"mode": "sync", "mixing": 0.3}, "`mixing` is for mode='pairwise', got 0.3 with mode='sync'"),
    ({"mode": "push_sum", "mixing": 0.3}, "`mixing` is for mode='pairwise', got 0.3 with mode='push_sum'"),
]


@pytest.mark.parametrize(("mode", "usual"), [("pairwise", 2), ("push_sum", 1), ("sync", 1), ("none", 1)])
def test_the_period_is_the_modes_own_unless_it_is_said(mode: Mode, usual: int) -> None:
    assert gossip(mode).period == gossip(mode, period=None).period == usual
    assert gossip(mode, period=5).period == 5


@pytest.mark.parametrize(("knobs", "sentence"), KNOBS)
def test_a_wrong_knob_says_what_is_wrong(knobs: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        gossip(**knobs)  # type: ignore[arg-type]
