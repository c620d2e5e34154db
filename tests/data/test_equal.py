"""Equal shares are a DistributedSampler's, position for position."""

from __future__ import annotations

import pytest
from torch.utils.data import DistributedSampler

from lightning_async.data.equal import EqualShare
from tests.data.epoch_bench import Clock, FakeBoard, at_once


def all_of(share: EqualShare, size: int) -> list[list[int]]:
    found = []
    while (batch := at_once(share.next_batch(size))) is not None:
        found.append(batch)
        share.completed()
    return found


@pytest.mark.parametrize("total", [1, 7, 8, 30])
@pytest.mark.parametrize("pad", [True, False])
def test_positions_are_those_of_distributed_sampler(total: int, pad: bool) -> None:
    for rank, desk in enumerate(FakeBoard(Clock(), 4).desks()):
        share = EqualShare(desk, batch=3, pad=pad)
        share.begin_epoch(0, total=total)
        if not pad and total < 4:
            continue  # torch's own sampler cannot be made then
        theirs = DistributedSampler(range(total), 4, rank, shuffle=False, drop_last=not pad)  # type: ignore[arg-type]
        batches = all_of(share, 3)
        assert [p for batch in batches for p in batch] == list(theirs)
        assert share.expected_batches() == len(batches)


def test_drop_last_drops_the_incomplete_batch() -> None:
    desk = FakeBoard(Clock(), 2).desks()[0]
    share = EqualShare(desk, batch=4, drop_last=True)
    share.begin_epoch(0, total=20)
    assert [len(b) for b in all_of(share, 4)] == [4, 4]
    assert share.expected_batches() == 2


def test_dropping_is_no_reason_to_train_on_nothing() -> None:
    desk = FakeBoard(Clock(), 2).desks()[0]
    EqualShare(desk, batch=4, drop_last=True).begin_epoch(0, total=7)
    with pytest.raises(ValueError, match="6 samples make no whole batch of 4 for each of 2 members"):
        EqualShare(desk, batch=4, drop_last=True).begin_epoch(0, total=6)


def test_rewound_batches_are_handed_out_again() -> None:
    desk = FakeBoard(Clock(), 2).desks()[1]
    share = EqualShare(desk, batch=2)
    share.begin_epoch(0, total=8)
    first = at_once(share.next_batch(2))
    assert share.outstanding == 2
    share.rewind()
    assert all_of(share, 2)[0] == first


def test_what_the_dead_left_is_counted() -> None:
    board = FakeBoard(Clock(), 2)
    shares = [EqualShare(desk, batch=2) for desk in board.desks()]
    for share in shares:
        share.begin_epoch(0, total=8)
        assert at_once(share.next_batch(2))
    shares[1].completed()
    board.alive.discard(1)
    assert shares[0].abandoned() == 2


def test_other_order_is_refused() -> None:
    shares = [EqualShare(desk, batch=2) for desk in FakeBoard(Clock(), 2).desks()]
    shares[0].begin_epoch(0, total=8, digest=1)
    shares[1].begin_epoch(0, total=8, digest=2)
    with pytest.raises(ValueError, match="disagree on the order"):
        all_of(shares[1], 2)


def test_batch_is_checked() -> None:
    with pytest.raises(ValueError, match="`batch` must be at least 1, got 0"):
        EqualShare(FakeBoard(Clock(), 1).desks()[0], batch=0)
