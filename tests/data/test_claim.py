"""Members of unlike speed on a virtual clock: the law holds, all end together, nobody waits for the store."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from lightning_async.data.claim import ClaimedShare
from lightning_async.data.ledger import audit
from lightning_async.data.share import make_share
from tests.data.epoch_bench import Clock, FakeBoard, Member, at_once, begin, crew, gap, run


@pytest.mark.few(2)
@pytest.mark.parametrize("ahead", [0, 1, 8])
@pytest.mark.parametrize("slowness", [1, 4, 10])
@pytest.mark.parametrize("seconds", [0.1, 1.0])
def test_all_members_end_their_epoch_together(slowness: int, ahead: int, seconds: float) -> None:
    board, members = crew([seconds] * 3 + [seconds * slowness], ahead=ahead)
    for epoch in range(2):
        begin(members, 8000, epoch)
        started = board.clock.time
        assert audit(run(board, members), 8000).holds
        assert gap(members) <= (1 + ahead) * seconds * slowness
        assert gap(members) <= 1.001 * seconds * slowness  # what it is in truth, whatever the look-ahead
        assert board.clock.time - started <= 1.01 * 1000 * seconds / (3 + 1 / slowness)


@pytest.mark.parametrize("slowness", [1, 4, 10])
def test_slow_store_and_late_notes_cost_no_waiting_in_mid_epoch(slowness: int) -> None:
    board, members = crew([0.2] * 3 + [0.2 * slowness], ahead=2, latency=0.01, beat=0.5)
    begin(members, 8000)
    assert audit(run(board, members), 8000).holds
    assert gap(members) <= (1 + 2) * 0.2 * slowness
    opened, nearly = 0.5, max(m.finished or 0.0 for m in members) - (2 + 2) * 0.2 * slowness
    assert not [time for m in members for time in m.waited if opened < time < nearly]
    assert all(len(m.waited) * 1e-3 <= 0.1 for m in members)


def test_notes_that_were_under_way_cost_little_at_the_end() -> None:
    """In all samples that could have been trained on while some waited for the last: the mean of many epochs."""
    seconds, lost = [0.025] * 3 + [0.087], []
    for more in range(24):
        board, members = crew(seconds, latency=0.004, beat=0.04)
        begin(members, 8 * (300 + more))
        assert audit(run(board, members), 8 * (300 + more)).holds
        ends = [m.finished or 0.0 for m in members]
        lost.append(sum((max(ends) - end) / each for end, each in zip(ends, seconds, strict=True)))
    assert sum(lost) / len(lost) <= 1.2 * sum(seconds[0] / each for each in seconds)  # one batch of the fast


def test_notes_are_wanted_soon_when_the_end_is_near_and_not_before() -> None:
    board, members = crew([0.02] * 3 + [0.08], ahead=1, latency=0.004, beat=0.5)
    begin(members, 8 * 1300)
    assert audit(run(board, members), 8 * 1300).holds
    end = max(m.finished or 0.0 for m in members)
    for member in members:
        assert not any(soon for time, soon in member.desk.soon if time < end / 2)
        assert all(soon for time, soon in member.desk.soon if time > end - 4 * 0.08)


def test_last_one_may_not_leave_what_others_left_to_it() -> None:
    board, members = crew([1.0, 1.0, 1.0, 1.0], ahead=3, latency=0.3, beat=5.0)
    begin(members, 8 * 41)
    assert audit(run(board, members), 8 * 41).holds


def chaos(seed: int) -> tuple[FakeBoard, list[Member], int, random.Random]:
    rng = random.Random(seed)
    world = rng.randint(1, 6)
    batches = [rng.choice([1, 4, 7, 16]) for _ in range(world)]
    total = rng.randint(world, 1500)
    board, members = crew(
        [rng.choice([0.05, 0.2, 1.0, 3.0]) for _ in range(world)],
        ahead=rng.choice([0, 1, 5]),
        batches=batches,
        latency=rng.choice([0.0, 0.01, 0.7]),
        beat=rng.choice([0.0, 0.5, 3.0]),
    )
    return board, members, total, rng


@pytest.mark.few(1)
@pytest.mark.parametrize("first", range(0, 45, 15))
def test_law_holds_for_any_speeds_and_batch_sizes(first: int) -> None:
    for seed in range(first, first + 15):
        board, members, total, _ = chaos(seed)
        for epoch in range(2):
            begin(members, total, epoch)
            result = audit(run(board, members), total)
            assert result.holds, f"seed {seed}: {result}"
            assert all(m.trained for m in members), f"seed {seed}: a member had no batch"


@pytest.mark.few(1)
@pytest.mark.parametrize("first", range(0, 45, 15))
def test_what_the_dead_left_is_repeated_or_reported(first: int) -> None:
    for seed in range(first, first + 15):
        board, members, total, rng = chaos(seed)
        board.beat = 0.0  # each death is known with its last word; what was drawn after it is the remaining loss
        begin(members, total)
        run_time = sum(m.seconds for m in members) * total / 100 / len(members) ** 2
        deaths = {k: rng.random() * run_time for k in rng.sample(range(len(members)), rng.randint(0, len(members) - 1))}
        shares = run(board, members, deaths)
        result = audit(shares, total)
        assert not result.double, f"seed {seed}: {result}"
        survivors = [m for k, m in enumerate(members) if k in board.alive]
        missing = sum(n for _, n in result.missing)
        assert {m.share.abandoned() for m in survivors} == {missing}, f"seed {seed}: {result}"


def test_work_of_a_member_that_dies_in_mid_epoch_is_done_by_the_others() -> None:
    board, members = crew([0.5, 0.5, 0.5, 0.5], ahead=2)
    begin(members, 8000)
    shares = run(board, members, {2: 40.2})
    assert members[2].trained
    assert audit(shares, 8000).holds
    assert sum(m.share.repeated for m in members) >= 3 * 8
    assert members[0].share.abandoned() == 0


def test_member_that_died_before_its_first_word_is_replaced() -> None:
    board, members = crew([0.5, 0.5, 0.5])
    begin(members, 240)
    assert audit(run(board, members, {1: -1.0}), 240).holds


def test_what_nobody_could_take_over_is_counted() -> None:
    board, members = crew([0.1, 3.0])
    begin(members, 16)
    run(board, members, {1: 1.0})
    assert members[0].share.abandoned() == 8


def test_same_answers_same_claims() -> None:
    claims = []
    for _ in range(2):
        board, members = crew([0.1, 0.3, 0.7], ahead=2, latency=0.01, beat=0.5)
        begin(members, 5000)
        claims.append([share.ledger.claims for share in run(board, members)])
    assert claims[0] == claims[1]


def test_equal_speeds_give_equal_counts() -> None:
    board, members = crew([1.0] * 4, ahead=3)
    begin(members, 8 * 4 * 20)
    run(board, members)
    assert [len(m.trained) for m in members] == [160] * 4


def test_drop_last_drops_the_same_tail_for_all() -> None:
    board, members = crew([1.0, 2.0], drop_last=True)
    begin(members, 83)
    assert audit(run(board, members), 80).holds
    assert members[0].share.abandoned() == 0


def test_dropping_is_no_reason_to_train_on_nothing() -> None:
    desk = FakeBoard(Clock(), 3).desks()[0]
    for total, whole in ((3, 0), (11, 2)):
        sentence = f"{total} samples make {whole} whole batches of 4, and each of 3 members needs one"
        for balance in ("claim", "incremental"):
            with pytest.raises(ValueError, match=sentence):
                make_share(balance, desk, batch=4, drop_last=True, size=total).begin_epoch(0, total=total)


def test_rewound_batches_are_handed_out_again() -> None:
    _, members = crew([1.0])
    share = members[0].share
    begin(members, 40)
    batches = [one(share), one(share), one(share)]
    share.completed()
    assert share.outstanding == 16
    share.rewind()
    assert [one(share), one(share)] == batches[1:]
    share.completed(8)
    assert share.outstanding == 8


def one(share: ClaimedShare) -> list[int] | None:
    return at_once(share.next_batch(8))


def test_expected_batches_follow_the_speed() -> None:
    board, members = crew([1.0, 1.0, 1.0, 4.0])
    begin(members, 8000)
    assert members[3].share.expected_batches() == 250
    run(board, members)
    begin(members, 8000, 1)
    assert one(members[3].share)
    members[3].share.rewind()
    assert members[3].share.expected_batches() == pytest.approx(77, abs=2)
    run(board, members)
    assert members[3].share.expected_batches() == math.ceil(len(members[3].trained) / 8)


def test_other_order_is_refused_with_a_sentence() -> None:
    _, members = crew([1.0, 1.0])
    members[0].share.begin_epoch(0, total=40, digest=1)
    members[1].share.begin_epoch(0, total=40, digest=2)
    one(members[0].share)
    with pytest.raises(ValueError, match="disagree on the order of epoch 0: the sampler must give the same indices"):
        one(members[1].share)


def test_other_size_is_refused_with_a_sentence() -> None:
    _, members = crew([1.0, 1.0])
    members[0].share.begin_epoch(0, total=40)
    members[1].share.begin_epoch(0, total=41)
    with pytest.raises(ValueError, match="41 samples here, 40 there"):
        one(members[1].share)


def test_knobs_are_checked_where_they_belong() -> None:
    desk = FakeBoard(Clock(), 3).desks()[0]
    with pytest.raises(ValueError, match="`batch` must be at least 1, got 0"):
        ClaimedShare(desk, batch=0)
    with pytest.raises(ValueError, match="`seconds` must be at least 0, got -1"):
        ClaimedShare(desk, batch=1, seconds=-1)
    with pytest.raises(ValueError, match="2 samples cannot be shared by 3 members"):
        ClaimedShare(desk, batch=1).begin_epoch(0, total=2)


def test_unknown_balance_is_refused() -> None:
    balance: Any = "fair"
    with pytest.raises(ValueError, match="`balance` must be 'claim', 'equal', 'incremental' or its knobs, got 'fair'"):
        make_share(balance, FakeBoard(Clock(), 1).desks()[0], batch=1)


def test_settled_when_all_have_ended() -> None:
    board, members = crew([1.0, 1.0], beat=0.5)
    begin(members, 80)
    assert not members[0].share.settled()
    run(board, members)
    assert not members[0].share.settled()  # the last word of the other one is still on its way
    board.clock.time += 0.5
    assert members[0].share.settled()


def test_one_share_feeds_one_loader() -> None:
    _, members = crew([1.0])
    begin(members, 80)
    with pytest.raises(ValueError, match="a share feeds one loader"):
        members[0].share.begin_epoch(0, total=81)


def test_what_was_drawn_after_the_last_word_is_found_again() -> None:
    for death in [20.0 + k / 4 for k in range(12)]:
        board, members = crew([0.2, 0.5, 1.0, 0.5], ahead=2, latency=0.3)
        begin(members, 3000)
        result = audit(run(board, members, {1: death}), 3000)
        assert result.holds, f"death at {death}: {result}"
