"""The paper's form: parts are added, one an epoch, and never moved; every sample owned is trained on once an epoch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lightning_async.data.balance import Incremental
from lightning_async.data.ledger import audit
from lightning_async.data.order import shuffled
from lightning_async.data.ranges import Range, each
from tests.data.epoch_bench import FakeBoard, Member, at_once, begin, crew, gap, run

N = 1600


def kept(seconds: list[float], parts: int = 5, **options: Any) -> tuple[FakeBoard, list[Member]]:
    return crew(seconds, balance=Incremental(parts=parts, partition="kept"), size=N, **options)


def epoch_of(
    board: FakeBoard, members: list[Member], epoch: int, deaths: dict[int, float] | None = None
) -> list[set[int]]:
    """The samples that each member trained on in an epoch over a shuffled order."""
    order = shuffled(N, 100 + epoch)
    begin(members, N, epoch, items=order)
    run(board, members, deaths)
    return [set(order[m.trained].tolist()) if m.trained else set() for m in members]


@pytest.mark.parametrize("slowness", [1, 4, 10])
def test_parts_are_equal_added_and_make_the_whole(slowness: int) -> None:
    board, members = kept([0.2] * 3 + [0.2 * slowness])
    before: list[set[int]] = [set()] * 4
    for epoch in range(8):
        seen = epoch_of(board, members, epoch)
        assert sum(len(own) for own in seen) == len(set().union(*seen)) == min(epoch + 1, 5) * N // 5
        assert all(old <= new for old, new in zip(before, seen, strict=True))
        assert [set(m.share.samples().tolist()) for m in members] == seen
        before = seen
        if sum(len(own) for own in seen) / (3 * slowness + 1) > 80:  # until then the first part was too much
            assert gap(members) <= 0.2 * slowness * 1.01


def test_the_short_epochs_are_made_good_by_half_as_many_more() -> None:
    for parts in (1, 3, 5, 8):
        board, members = kept([0.2, 0.4], parts)
        epochs = [sum(len(own) for own in epoch_of(board, members, epoch)) for epoch in range(12 + parts)]
        for k in (parts, 12):
            assert sum(epochs[: k + parts // 2]) <= k * N + N
            extra = (parts - 1) / 2
            visits = sum(epochs[: k + int(extra)]) + (extra % 1) * N
            assert visits == pytest.approx(k * N, abs=8 * parts), f"{parts} parts, {k} epochs"


def test_equal_speeds_own_equal_shares() -> None:
    board, members = kept([1.0] * 4)
    for epoch in range(5):
        assert [len(own) for own in epoch_of(board, members, epoch)] == [80 * (epoch + 1)] * 4


def test_positions_follow_the_order_of_the_epoch() -> None:
    board, members = kept([1.0])
    epoch_of(board, members, 0)
    assert members[0].trained == sorted(members[0].trained)


def test_the_ledger_and_what_is_left_out_make_the_epoch() -> None:
    board, members = kept([0.2, 0.5, 0.2])
    for epoch in range(6):
        epoch_of(board, members, epoch)
        rest = members[0].share.left_out()
        assert all(m.share.left_out() == rest for m in members)
        assert sorted(each([*rest, *(r for m in members for r in m.share.done())])) == list(range(N))


@pytest.mark.parametrize("when", [1.0, 3.7])
def test_what_a_dead_member_owned_is_added_to_the_others(when: float) -> None:
    board, members = kept([0.2, 0.2, 0.2, 0.4])
    for epoch in range(2):
        epoch_of(board, members, epoch)
    before = [set(m.share.samples().tolist()) for m in members]
    order = shuffled(N, 1)
    begin(members, N, 2, items=order)
    shares = run(board, members, {1: board.clock.time + when})
    positions = each([*members[0].share.left_out(), *(r for share in shares for r in share.done())])
    assert sorted(positions) == list(range(N))  # the epoch of the death is whole
    living = [m for k, m in enumerate(members) if k != 1]
    seen = epoch_of(board, living, 3)
    assert sum(len(own) for own in seen) == len(set().union(*seen)) == 4 * N // 5
    assert before[1] <= set().union(*seen)
    assert all(before[k] <= own for k, own in zip((0, 2, 3), seen, strict=True))
    assert gap(living) <= 0.5


def interrupted(board: FakeBoard, members: list[Member], epoch: int, until: float) -> tuple[list[Range], Any]:
    """What is done of an epoch that was cut short, and what a checkpoint says besides."""
    begin(members, N, epoch, items=shuffled(N, 100 + epoch))
    shares = run(board, members, until=board.clock.time + until)
    done = [r for share in shares for r in share.done()] + members[0].share.left_out()
    return done, members[0].share.memory()


@pytest.mark.parametrize("after", [1, 2, 3, 5])
@pytest.mark.parametrize("until", [0.5, 2.9, 60.0])
def test_an_interrupted_epoch_goes_on_with_any_number_of_members(after: int, until: float) -> None:
    board, members = kept([0.2, 0.2, 0.4])
    for epoch in range(2):
        epoch_of(board, members, epoch)
    owned = [set(m.share.samples().tolist()) for m in members]
    done, memory = interrupted(board, members, 2, until)
    owned = [set(m.share.samples().tolist()) for m in members]
    board, members = kept([0.2] * after)
    for member in members:
        member.share.recall(memory)
    order = shuffled(N, 102)
    begin(members, N, 2, done=done, items=order)
    shares = run(board, members)
    now = [set(m.share.samples().tolist()) for m in members]
    assert set().union(*now) == set().union(*owned)
    assert sum(len(own) for own in now) == 3 * N // 5
    if len(set(each(done))) < N - 8 * after:
        assert sorted(each([*done, *(r for s in shares for r in s.done())])) == list(range(N))
    if after <= 3:
        assert all(old <= new for old, new in zip(owned, now, strict=False))
    seen = epoch_of(board, members, 3)
    assert sum(len(own) for own in seen) == 4 * N // 5


def test_every_member_has_a_batch_whatever_the_limit() -> None:
    for drop_last in (False, True):
        board, members = kept([0.2] * 4, drop_last=drop_last)
        begin(members, N, limit=32, items=shuffled(N, 5))
        run(board, members)
        assert all(m.trained for m in members)
        assert {p < 32 for m in members for p in m.trained} == {True}


def test_law_holds_for_any_speeds_and_batch_sizes() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        world = rng.randint(1, 6)
        board, members = kept(
            [rng.choice([0.05, 0.2, 1.0, 3.0]) for _ in range(world)],
            rng.choice([1, 3, 10]),
            ahead=rng.choice([0, 1, 5]),
            batches=[rng.choice([1, 4, 7, 16]) for _ in range(world)],
            latency=rng.choice([0.0, 0.01, 0.7]),
            beat=rng.choice([0.0, 0.5, 3.0]),
        )
        for epoch in range(3):
            seen = epoch_of(board, members, epoch)
            assert sum(len(own) for own in seen) == len(set().union(*seen)), f"seed {seed}"
            assert all(seen), f"seed {seed}: a member had no batch"
            assert not audit([m.share for m in members], N).double


def test_a_data_set_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="`partition='kept'` needs a DataLoader with a `batch_size`"):
        crew([1.0], balance=Incremental(partition="kept"))


def test_memory_is_tensors(tmp_path: Any) -> None:
    board, members = kept([0.2, 0.4])
    epoch_of(board, members, 0)
    torch.save(members[0].share.memory(), tmp_path / "memory.pt")
    memory = torch.load(tmp_path / "memory.pt", weights_only=True)
    _, again = kept([0.2, 0.4])
    again[1].share.recall(memory)
    assert again[1].share.samples().tolist() == members[1].share.samples().tolist()


def test_the_epoch_of_a_checkpoint_adds_no_second_part() -> None:
    board, members = kept([0.2, 0.2])
    done, memory = interrupted(board, members, 0, 1.0)
    board, members = kept([0.2, 0.2])
    for member in members:
        member.share.recall(memory)
    begin(members, N, 0, done=done, items=shuffled(N, 100))
    at_once(members[0].share.next_batch(8))
    assert members[0].share.partition.given == N // 5
