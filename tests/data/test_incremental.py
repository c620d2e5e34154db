"""Parts by measured speed, on a virtual clock and on both boards: the law holds, all end together, nobody waits."""

from __future__ import annotations

import random
import time
from collections.abc import Generator
from typing import Any

import pytest

from lightning_async.data.balance import Incremental
from lightning_async.data.incremental import IncrementalShare
from lightning_async.data.ledger import audit
from lightning_async.data.ranges import unpack_ranges
from lightning_async.data.share import make_share
from lightning_async.transport.mail import Wait
from lightning_async.transport.virtual import VirtualCluster
from tests.data.epoch_bench import Clock, FakeBoard, Member, at_once, begin, crew, gap, run
from tests.transport.cluster_world import ClusterWorld


def parts_of(board: FakeBoard, epoch: int = 0) -> list[int]:
    """The sizes of the parts that were decided, but for the first."""
    keys = sorted((int(key.rsplit("/", 1)[1]), key) for key in board.keys if key.startswith(f"data/part/{epoch}/"))
    return [sum(n for _, n in unpack_ranges(board.keys[key][1])) for _, key in keys]


@pytest.mark.parametrize("ahead", [0, 1, 8])
@pytest.mark.parametrize("slowness", [1, 4, 10])
def test_all_members_end_their_epoch_together(slowness: int, ahead: int) -> None:
    board, members = crew([0.2] * 3 + [0.2 * slowness], ahead=ahead, balance="incremental")
    for epoch in range(2):
        begin(members, 8000, epoch)
        started = board.clock.time
        assert audit(run(board, members), 8000).holds
        assert gap(members) <= 2.001 * 0.2 * slowness  # of what the others do, one batch each is not known yet
        assert board.clock.time - started <= 1.02 * 1000 * 0.2 / (3 + 1 / slowness)
    assert [800, *parts_of(board)] == [800] * 10


def test_equal_speeds_get_equal_shares() -> None:
    board, members = crew([1.0] * 4, ahead=3, balance="incremental")
    for epoch in range(2):
        begin(members, 8 * 4 * 40, epoch)
        run(board, members)
        assert [len(m.trained) for m in members] == [320] * 4


def test_only_one_batch_of_an_epoch_is_short() -> None:
    board, members = crew([0.2, 0.3, 0.7, 0.2], balance="incremental")
    begin(members, 8 * 300 + 1)
    run(board, members)
    assert sorted(len(m.trained) % 8 for m in members) == [0, 0, 0, 1]


def test_the_first_part_goes_by_nominal_speed_and_the_rest_by_measure() -> None:
    board, members = crew([1.0, 1.0, 4.0], balance=Incremental(parts=5, nominal=[4.0, 4.0, 1.0]))
    begin(members, 9000)
    for member in members:
        at_once(member.share.next_batch(8))
        member.share.rewind()
    assert [m.share.ledger.claimed for m in members] == [800, 800, 200]
    run(board, members)
    assert [len(m.trained) for m in members] == pytest.approx([4000, 4000, 1000], abs=8)


def test_wrong_nominal_speeds_are_made_good() -> None:
    board, members = crew([1.0, 1.0, 4.0], balance=Incremental(nominal=[1.0, 1.0, 1.0]))
    begin(members, 9000)
    run(board, members)
    assert gap(members) <= 4.0
    assert [len(m.trained) for m in members] == pytest.approx([4000, 4000, 1000], abs=16)


def test_a_member_that_becomes_slower_gets_less_from_then_on() -> None:
    board, members = crew([0.2, 0.2], balance="incremental")
    begin(members, 8000)
    members[1].seconds = 0.8
    for epoch in range(3):
        begin(members, 8000, epoch + 1)
        run(board, members)
    assert [len(m.trained) for m in members] == pytest.approx([6400, 1600], abs=16)


@pytest.mark.parametrize("slowness", [1, 4, 10])
def test_slow_store_and_late_notes_cost_no_waiting_in_mid_epoch(slowness: int) -> None:
    board, members = crew([0.2] * 3 + [0.2 * slowness], ahead=2, latency=0.01, beat=0.3, balance="incremental")
    begin(members, 8000)
    assert audit(run(board, members), 8000).holds
    assert not [t for m in members for t in m.waited if t > 0.5]
    assert gap(members) <= 3 * 0.2 * slowness


def chaos(seed: int) -> tuple[FakeBoard, list[Member], int, random.Random]:
    rng = random.Random(seed)
    world = rng.randint(1, 6)
    board, members = crew(
        [rng.choice([0.05, 0.2, 1.0, 3.0]) for _ in range(world)],
        ahead=rng.choice([0, 1, 5]),
        batches=[rng.choice([1, 4, 7, 16]) for _ in range(world)],
        latency=rng.choice([0.0, 0.01, 0.7]),
        beat=rng.choice([0.0, 0.5, 3.0]),
        balance=Incremental(parts=rng.choice([1, 2, 10, 50])),
    )
    return board, members, rng.randint(world, 1500), rng


@pytest.mark.parametrize("first", range(0, 45, 15))
def test_law_holds_for_any_speeds_batches_and_parts(first: int) -> None:
    for seed in range(first, first + 15):
        board, members, total, _ = chaos(seed)
        for epoch in range(2):
            begin(members, total, epoch)
            result = audit(run(board, members), total)
            assert result.holds, f"seed {seed}: {result}"
            assert all(m.trained for m in members), f"seed {seed}: a member had no batch"


@pytest.mark.parametrize("first", range(0, 60, 15))
def test_what_the_dead_left_is_repeated_or_reported(first: int) -> None:
    for seed in range(first, first + 15):
        board, members, total, rng = chaos(seed)
        board.beat = 0.0
        begin(members, total)
        run_time = sum(m.seconds for m in members) * total / 100 / len(members) ** 2
        deaths = {k: rng.random() * run_time for k in rng.sample(range(len(members)), rng.randint(0, len(members) - 1))}
        result = audit(run(board, members, deaths), total)
        assert not result.double, f"seed {seed}: {result}"
        survivors = [m for k, m in enumerate(members) if k in board.alive]
        missing = sum(n for _, n in result.missing)
        assert {m.share.abandoned() for m in survivors} == {missing}, f"seed {seed}: {result}"


@pytest.mark.parametrize("dead", [0, 2])
def test_work_of_a_member_that_dies_in_mid_epoch_is_done_by_the_others(dead: int) -> None:
    board, members = crew([0.5] * 4, ahead=2, balance="incremental")
    begin(members, 8000)
    shares = run(board, members, {dead: 40.2})
    assert members[dead].trained
    assert audit(shares, 8000).holds
    assert sum(m.share.repeated for m in members) >= 3 * 8
    assert members[1].share.abandoned() == 0


def test_an_heir_that_dies_too_is_replaced() -> None:
    board, members = crew([1.0, 1.0, 1.0, 1.0], balance=Incremental(parts=1))
    begin(members, 3200)
    shares = run(board, members, {0: 10.2, 1: 112.2})
    assert audit(shares, 3200).holds


def test_a_silent_member_gets_nothing_more_and_keeps_what_it_has() -> None:
    board, members = crew([0.5, 0.5, 0.5], balance="incremental")
    begin(members, 3000)
    asleep = members[2]

    def live(desk: Any) -> tuple[int, ...]:
        return (0, 1)

    for member in members[:2]:
        member.desk.live = live.__get__(member.desk)  # type: ignore[method-assign]
    at_once(asleep.share.next_batch(8))
    run(board, members[:2])
    assert [len(m.trained) for m in members[:2]] == pytest.approx([1450, 1450], abs=16)
    assert asleep.share.ledger.claimed == pytest.approx(100, abs=8)


def test_dropped_ends_are_dropped_once() -> None:
    board, members = crew([1.0, 2.0, 3.0], drop_last=True, balance="incremental")
    begin(members, 8 * 100 + 5)
    assert audit(run(board, members), 800).holds
    assert members[0].share.abandoned() == 0


def test_rewound_batches_are_handed_out_again() -> None:
    _, members = crew([1.0], balance="incremental")
    share = members[0].share
    begin(members, 400)
    batches = [at_once(share.next_batch(8)) for _ in range(3)]
    share.completed()
    share.rewind()
    assert [at_once(share.next_batch(8)), at_once(share.next_batch(8))] == batches[1:]


def test_expected_batches_follow_the_speed() -> None:
    board, members = crew([1.0, 1.0, 1.0, 4.0], balance="incremental")
    begin(members, 8000)
    assert members[3].share.expected_batches() == 250
    run(board, members)
    begin(members, 8000, 1)
    at_once(members[3].share.next_batch(8))
    members[3].share.rewind()
    assert members[3].share.expected_batches() == pytest.approx(77, abs=2)


def test_speeds_go_on_in_the_next_run() -> None:
    board, members = crew([1.0, 4.0], balance="incremental")
    begin(members, 4000)
    run(board, members)
    _, again = crew([1.0, 4.0], balance="incremental")
    for member in again:
        member.share.recall(members[0].share.memory())
    begin(again, 4000)
    for member in again:
        at_once(member.share.next_batch(8))
    assert [m.share.ledger.claimed for m in again] == pytest.approx([320, 80], abs=1)


def test_probes_open_the_first_epoch_when_all_have_made_theirs() -> None:
    board = FakeBoard(Clock(), 2)
    knobs = Incremental(nominal="probe")
    shares = [IncrementalShare(d, knobs, batch=8, probe=lambda d=d: 1.0 + 2 * d.me) for d in board.desks()]
    shares[0].begin_epoch(0, total=4000)
    waiting = shares[0].next_batch(8)
    assert next(waiting) == "the nominal speeds of the members [1]"
    shares[1].begin_epoch(0, total=4000)
    assert at_once(waiting) == list(range(8))
    at_once(shares[1].next_batch(8))
    assert [share.ledger.claimed for share in shares] == pytest.approx([100, 300], abs=8)


def test_a_probe_of_a_member_that_died_is_not_waited_for() -> None:
    board = FakeBoard(Clock(), 2)
    share = IncrementalShare(board.desks()[0], Incremental(nominal="probe"), batch=8, probe=lambda: 1.0)
    share.begin_epoch(0, total=4000)
    waiting = share.next_batch(8)
    next(waiting)
    board.alive.discard(1)
    assert at_once(waiting) == list(range(8))


def test_other_order_is_refused_with_a_sentence() -> None:
    _, members = crew([1.0, 1.0], balance="incremental")
    members[0].share.begin_epoch(0, total=40, digest=1)
    members[1].share.begin_epoch(0, total=40, digest=2)
    at_once(members[0].share.next_batch(8))
    with pytest.raises(ValueError, match="disagree on the order of epoch 0"):
        at_once(members[1].share.next_batch(8))


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"parts": 0}, "`parts` must be an integer of at least 1, got 0"),
        ({"partition": "moved"}, "`partition` must be 'redrawn' or 'kept', got 'moved'"),
        ({"memory": 0.0}, "`memory` must be above 0 and at most 1, got 0.0"),
        ({"nominal": "guess"}, "`nominal` must be 'equal', 'probe', or one speed above 0 for each rank, got 'guess'"),
        ({"nominal": [1.0, 0.0]}, "one speed above 0 for each rank"),
        ({"nominal": []}, "one speed above 0 for each rank"),
    ],
)
def test_knobs_are_checked(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Incremental(**knobs)


# ---- the other two boards


def life(share: Any, total: int, seconds: float) -> Generator[Any, None, None]:
    share.begin_epoch(0, total=total)
    while (yield from share.next_batch(8)) is not None:
        yield seconds
        share.completed()


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_law_holds_on_the_virtual_cluster(seed: int, dies: bool) -> None:
    cluster = VirtualCluster(4, seed=seed)
    shares = [make_share("incremental", carrier, batch=8) for carrier in cluster.carriers]
    if dies:
        cluster.kill(3, at=5.0 + 5 * seed)
    cluster.run({k: life(share, 4000, 0.25 * (1 + 3 * (k == 2))) for k, share in enumerate(shares)})
    cluster.advance(60.0)
    result = audit(shares, 4000)
    assert result.holds, f"{result}"
    assert dies or shares[2].ledger.completed == pytest.approx(4000 / 13, abs=16)  # type: ignore[attr-defined]


def test_law_holds_on_a_real_board() -> None:
    """Three members in one thread: whoever waits is asked again, whoever trains sleeps until its batch is over."""
    world, seconds = ClusterWorld(3), [0.02, 0.02, 0.1]
    try:
        shares = [make_share("incremental", carrier, batch=8) for carrier in world.carriers]
        lives: dict[int, Wait[None]] = {k: life(s, 640, seconds[k]) for k, s in enumerate(shares)}
        until, end = dict.fromkeys(lives, 0.0), time.monotonic() + 20
        while lives:
            assert time.monotonic() < end
            for k in [k for k in lives if until[k] <= time.monotonic()]:
                try:
                    said: Any = next(lives[k])
                except StopIteration:
                    del lives[k]
                    continue
                until[k] = time.monotonic() + (said if isinstance(said, float) else 0.0)
            world.carriers[0].wait(0.001)
        assert audit(shares, 640).holds  # how far parts follow speeds: exactly, on the virtual clock above
    finally:
        world.close()
