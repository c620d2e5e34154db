"""A cut keeps the sum, holds what was between two records and nothing else, runs on, and makes nobody wait."""

from __future__ import annotations

import io
import math
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_async.algorithms.algorithm import UNIT
from lightning_async.algorithms.cut import Part, Sum, packed, put_together, unpacked
from lightning_async.algorithms.gossip import Gossip, gossip
from lightning_async.algorithms.pairwise import ANSWER, ASK, BOUNCE
from lightning_async.algorithms.worth import Worth
from lightning_async.arrival import Fate
from lightning_async.transport.mail import Message
from lightning_async.transport.virtual import VirtualCluster
from tests.algorithms.cut_world import NOTHING, STARTS, Plan, World, check_links, run
from tests.transport.cluster_world import ClusterWorld

SEEDS = int(os.environ.get("LIGHTNING_ASYNC_CUTS", "2000"))  # how many runs; more find more
BATCHES = 20


def seeds(batch: int, share: float = 1.0) -> range:
    """One batch of the seeds; of some tests a share of them is enough."""
    count = max(1, int(SEEDS * share / BATCHES))
    return range(batch * count, (batch + 1) * count)


def check_same(found: Worth, expected: Worth, plan: Plan) -> None:
    """Masses exactly, weights to 1e-5 of a mean's."""
    assert found.mass == expected.mass, plan
    apart = (found.vector - expected.vector).abs().max()
    assert apart <= 1e-5 * sum(plan.masses) / UNIT, (apart, plan)


# -- laws over many runs -----------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_cut_keeps_the_sum_and_holds_what_was_between_the_records(batch: int) -> None:
    """Any speeds, latencies, bandwidths, faults, initiators and moments; a second cut when the first is all there."""
    under_way = 0
    for seed in seeds(batch):
        plan = Plan.drawn(seed)
        world = run(plan)
        for number in [1, 2] if plan.second else [1]:
            cut = world.cut(number)
            under_way += check_links(cut)
            check_same(world.total(cut), plan.born(), plan)
        assert all(trained.waits == 0 for trained in world.trained.values()), plan
    assert under_way > len(seeds(batch))  # or nothing was tested


@pytest.mark.few(4)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_the_consensus_of_a_cut_has_all_but_what_is_missing(batch: int) -> None:
    """Bounced or not, on its way there or back: each message counts once."""
    for seed in seeds(batch, 0.2):
        plan = Plan.drawn(seed, second=set())
        world = run(plan)
        cut, total, count = world.cut(1), Sum(), len(STARTS[0])
        expected = sum((world.counted(part) for part in cut.values()), start=NOTHING)
        for r, part in cut.items():
            state = part.state
            worth = world.algorithms[r].brings(state["weights"], state["algorithm"], part.letters)
            total.add(torch.cat([worth.vector, torch.full((2,), float(r), dtype=torch.float64)]), worth.mass)
            missing = list(state["algorithm"]["ledger"]["moved"].values())
            lost = [world.algorithms[r].worth(loss.message, lost=True) for loss in part.losses]
            missing += [worth.vector for worth in lost if worth is not None]
            expected = Worth(expected.vector - sum(missing, torch.zeros(count)), expected.mass)
        weights, rest = total.means(count)
        mass = total.mass / UNIT
        assert (weights * mass - expected.vector).abs().max() <= 1e-5 * sum(plan.masses) / UNIT, plan
        assert rest.tolist() == [(plan.n - 1) / 2] * 2


def test_a_part_may_come_in_pieces_and_the_means_stand_in_the_place_of_the_sum() -> None:
    """To the bit, in whatever order those of several parts come; and one that comes behind the means is refused."""
    parts = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    whole, pieces = Sum(), Sum()
    for number, part in enumerate(parts):
        whole.add(part, (number + 1) * UNIT)
    for at in range(0, 10, 4):
        for number, part in enumerate(parts):
            pieces.add(part[at : at + 4], (number + 1) * UNIT, at=at, numel=10)
    assert (pieces.mass, pieces.count) == (whole.mass, whole.count) == (6 * UNIT, 3)
    for one, other in zip(pieces.means(8), whole.means(8), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(pieces.means(8)[0], parts.double().sum(0)[:8] / 6), "they are taken once"
    with pytest.raises(ValueError, match="the means were taken"):
        pieces.add(parts[0], UNIT)


def test_no_part_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no part was added"):
        Sum().means(1)


@pytest.mark.few(4)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_restored_cut_runs_on_and_can_be_cut_again(batch: int) -> None:
    for seed in seeds(batch, 0.1):
        plan = Plan.drawn(seed, second=set())
        world = run(plan, meets=True)
        cut = world.cut(1)
        back = run(plan, source=cut, cuts=False, meets=True)
        check_same(world.total_now(), plan.born(), plan)
        check_same(back.total_now(), plan.born(), plan)
        if plan.knobs["max_delay"] is None:  # nothing was refused: the consensus is that of all samples, in both runs
            torch.testing.assert_close(back.trained[0].consensus, world.trained[0].consensus, rtol=0, atol=1e-5)
        again = run(replace(plan, begins=dict.fromkeys(plan.begins, 0)), source=cut)
        check_same(again.total(again.cut(1)), plan.born(), plan)


@pytest.mark.few(4)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_death_gives_a_cut_up_or_comes_too_late_for_it(batch: int) -> None:
    """A cut that comes together is whole all the same; and those who live take the next ones."""
    for seed in seeds(batch, 0.2):
        plan = Plan.killing(seed)
        world = run(plan)
        second, third = world.cut(2), world.cut(3)
        assert set(second) == set(third) == world.survivors
        check_links(second)
        check_links(third)
        check_same(world.total(second), world.total(third), plan)
        try:
            first = world.cut(1)
        except ValueError as error:
            assert "given up" in str(error) or "all members' or nobody's" in str(error)  # noqa: PT017
            continue
        check_links(first)
        if set(first) == world.survivors:
            check_same(world.total(first), world.total(second), plan)
        elif first:
            check_same(world.total(first), plan.born(), plan)


@pytest.mark.few(6)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_cut_changes_nothing_where_its_markers_cost_nothing(batch: int) -> None:
    """To the bit. Only the dates are fresher: a marker's acknowledgement carries the receiver's step as any other does.

    A bandwidth, or jitter that the markers draw from the same chance, would move the other messages in time. Members
    look for cuts before they fold: who looks only afterwards folds what is behind a marker one step later.
    """
    for seed in seeds(batch, 0.1):
        plan = Plan.drawn(seed, second=set(), late=True, faults=[])
        plan.network.update(jitter=0.0, bandwidth=None)
        plan.knobs["max_delay"] = None
        plain, cut = run(plan, cuts=False), run(plan)
        assert cut.cut(1)
        for r in range(plan.n):
            assert folds(plain, r) == folds(cut, r), plan
            assert torch.equal(plain.replicas[r].flat, cut.replicas[r].flat), plan


def folds(world: World, r: int) -> list[tuple[int, int, int, Fate]]:
    return [(a.peer, a.base, a.folded, a.fate) for a in world.trained[r].arrivals]


# -- against something trusted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("latency", [0.0043, 0.0137, 0.0541, 0.2119])
@pytest.mark.parametrize("speeds", [(0.02, 0.031), (0.02, 0.0831), (0.0711, 0.02)])
def test_against_a_twin_without_markers(speeds: tuple[float, float], latency: float) -> None:
    plan = Plan(
        n=2,
        knobs={"mode": "push_sum", "max_delay": None},
        speeds=list(speeds),
        steps=[40, 120],
        masses=[UNIT, UNIT],
        lr=0.5,
        begins={0: 7},
        network={"latency": latency, "jitter": 0.0},
    )
    cut = run(plan).cut(1)
    for r, (step, mass, weights, under_way) in twin(plan, latency).items():
        state, letters = cut[r].state, [letter.message for letter in cut[r].letters]
        assert (state["step"], state["algorithm"]["mass"]) == (step, mass)
        assert state["weights"][:2].tolist() == pytest.approx(weights, abs=1e-5)
        assert [letter.weight for letter in letters] == [share for share, _ in under_way]
        for letter, (_, sent) in zip(letters, under_way, strict=True):
            assert letter.body is not None
            assert letter.body[:2].tolist() == pytest.approx(sent, abs=1e-5)


def twin(plan: Plan, latency: float) -> dict[int, tuple[int, int, list[float], list[tuple[int, list[float]]]]]:
    """Push-sum of two members in plain Python, by one who sees everything, and the cut by its definition.

    Member 0 records before its step 7, member 1 before its first step after it can know of that. Under way is what was
    sent before its sender's record and folded after its receiver's.
    """
    x, mass, step = [STARTS[r][:2].tolist() for r in (0, 1)], [UNIT, UNIT], [0, 0]
    due, free_at = list(plan.speeds), [0.0, 0.0]
    sent: list[dict[str, Any]] = []
    before: list[list[tuple[float, int, int, list[float]]]] = [[], []]  # each step's time, and the state before it
    while min(step) < 25:
        r = due.index(min(due))
        now, other = due[r], 1 - r
        before[r].append((now, step[r], mass[r], list(x[r])))
        step[r] += 1
        x[r][r] += plan.lr * UNIT / mass[r]
        for share in sent:
            if share["to"] == r and share["folded"] is None and share["at"] + latency <= now:
                share["folded"] = now
                mass[r] += share["mass"]
                x[r] = [a + share["mass"] / mass[r] * (b - a) for a, b in zip(x[r], share["x"], strict=True)]
                free_at[other] = now + latency
        half = min(mass[r] // 2, mass[r] - UNIT // 2)
        if 16 * half >= UNIT and now >= free_at[r]:
            mass[r] -= half
            free_at[r] = math.inf
            sent.append({"to": other, "at": now, "mass": half, "x": list(x[r]), "folded": None})
        due[r] += plan.speeds[r]
    first = before[0][6]
    records = [first, next(state for state in before[1] if state[0] >= first[0] + latency)]
    cut = {}
    for r, (now, *state) in enumerate(records):
        under_way = [
            (share["mass"], share["x"])
            for share in sent
            if share["to"] == r and share["at"] < records[1 - r][0] and not (share["folded"] or math.inf) < now
        ]
        cut[r] = (*state, under_way)
    return cut  # type: ignore[return-value]


def test_on_real_links_and_restored_on_a_virtual_cluster() -> None:
    plan = Plan(
        n=2,
        knobs={"mode": "pairwise", "max_delay": None},
        speeds=[0.0, 0.0],
        steps=[60, 60],
        masses=[UNIT, UNIT],
        lr=0.5,
        begins={1: 20},
        second={0},
        late=False,
    )
    links = ClusterWorld(2)
    world = World(plan, links.carriers)
    programs, turns = {r: world.life(r) for r in range(2)}, iter(range(10**9))

    def step() -> bool:
        r = next(turns) % 3 % 2  # member 0 takes two steps to one of member 1
        if r in programs:
            try:
                next(programs[r])
            except StopIteration as end:
                world.trained[r] = end.value
                del programs[r]
        return not programs

    links.until(step, limit=60)
    links.close()
    assert all(trained.waits == 0 and trained.arrivals for trained in world.trained.values())
    for number in (1, 2):
        cut = world.cut(number)
        check_links(cut)
        check_same(world.total(cut), plan.born(), plan)
        back = run(plan, source=cut, cuts=False, meets=True)
        check_same(back.total_now(), plan.born(), plan)


# -- putting together and saving ---------------------------------------------------------------------------------------


def test_a_part_survives_a_file() -> None:
    plan = Plan.drawn(3, second=set(), faults=[])
    world = run(plan)
    cut = world.cut(1)
    for part in cut.values():
        part.state = {name: part.state[name] for name in ("weights", "algorithm", "step")}
    file = io.BytesIO()
    torch.save([packed(part) for part in cut.values()], file)
    file.seek(0)
    loaded = put_together(unpacked(pack) for pack in torch.load(file, weights_only=True))
    first, second = (run(plan, source=source, cuts=False, meets=True) for source in (cut, loaded))
    for r in range(plan.n):
        assert torch.equal(first.replicas[r].flat, second.replicas[r].flat)


def test_mass_that_is_not_all_there_is_found() -> None:
    parts = [Part(1, r, (0, 1), r) for r in (0, 1)]
    assert set(put_together(parts, mass=lambda part: 5, born=10)) == {0, 1}
    with pytest.raises(ValueError, match="count a mass of 10, and 11 was born: they are damaged"):
        put_together(parts, mass=lambda part: 5, born=11)


# -- what algorithms say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_delay", [None, 1])
def test_an_answer_counts_the_askers_move_and_a_bounce_the_answerers(max_delay: int | None) -> None:
    plan = Plan.drawn(0, n=2, knobs={"mode": "pairwise", "period": 1, "max_delay": max_delay}, masses=[UNIT, 3 * UNIT])
    cluster = VirtualCluster(2)
    world = World(plan, cluster.carriers)
    (a, b), posted = world.algorithms, []

    def step(r: int, number: int) -> None:
        cluster.advance(0.1)
        drop = world.accounts[r].post
        world.accounts[r].post = lambda peer, m: (
            posted.append(replace(m, body=m.body if m.body is None else m.body.clone())) or drop(peer, m)
        )  # type: ignore[method-assign]
        list(world.algorithms[r].after_step(world.replicas[r], world.accounts[r], number))
        world.accounts[r].post = drop  # type: ignore[method-assign]

    for r in (0, 1):
        world.algorithms[r].begin(world.replicas[r], world.accounts[r], plan.masses[r], world.rounds[r])
    step(0, 1)
    assert [b.worth(m) for m in posted if m.kind == ASK] == [None]
    step(1, 1)
    (answer,) = [m for m in posted if m.kind == ANSWER]
    check_same(world.total_now() + worth(a, answer), plan.born(), plan)
    a.period = 100  # no more questions
    step(0, 5)
    bounces = [m for m in posted if m.kind == BOUNCE]
    assert len(bounces) == (max_delay is not None)
    for bounce in bounces:
        check_same(world.total_now() + worth(b, bounce), plan.born(), plan)
        assert b.worth(bounce, lost=True) is None
    step(1, 2)
    check_same(world.total_now(), plan.born(), plan)


def worth(algorithm: Gossip, message: Message) -> Worth:
    """What counts."""
    found = algorithm.worth(message)
    assert found is not None
    return found


def test_sync_refuses() -> None:
    with pytest.raises(
        RuntimeError, match=r"mode='sync' is in lock-step and cannot be cut between meetings: .*pairwise"
    ):
        gossip("sync").midway()
