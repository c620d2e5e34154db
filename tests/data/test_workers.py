"""Members whose loaders have workers: what those hold is not hoarded, although in the first epoch no speed is known."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest

from lightning_async.data.ledger import audit
from lightning_async.data.pace import LoaderPace
from lightning_async.data.share import make_share
from tests.data.epoch_bench import Clock, FakeBoard, Member, Prefetching, at_once, begin, run

BATCH = 4
START = 0.1
LATENCY = 0.002


def crew(
    seconds: Sequence[float], *, workers: int, prefetch: int, beat: float = 0.05
) -> tuple[FakeBoard, list[Member]]:
    """Members by their seconds per batch; their workers need `START` seconds for the first one."""
    board = FakeBoard(Clock(), len(seconds), latency=LATENCY, beat=beat)
    desks = zip(board.desks(), seconds, strict=True)
    return board, [
        Prefetching(
            make_share("claim", desk, batch=BATCH),
            desk,
            batch=BATCH,
            seconds=each,
            workers=workers,
            prefetch=prefetch,
            start=START,
        )
        for desk, each in desks
    ]


def apart(members: list[Member]) -> float:
    """Seconds between the last steps' beginnings of the first and the last to begin it."""
    ends = [member.last or 0.0 for member in members]
    return max(ends) - min(ends)


@pytest.mark.few(1)
@pytest.mark.parametrize("beat", [0.02, 0.5])
@pytest.mark.parametrize(("workers", "prefetch"), [(1, 2), (4, 1), (4, 2), (4, 8)])
def test_nobody_is_more_than_its_look_ahead_behind(workers: int, prefetch: int, beat: float) -> None:
    for ranks, slowness, step, batches in product([2, 4], [1, 5, 10], [0.001, 0.03], [10, 30, 100, 200]):
        slow = step * slowness
        board, members = crew([step] * (ranks - 1) + [slow], workers=workers, prefetch=prefetch, beat=beat)
        for epoch in range(2):
            case = f"{ranks} ranks, {slowness}x, {step} s, {batches} batches, epoch {epoch}"
            begin(members, batches * BATCH, epoch)
            result = audit(run(board, members), batches * BATCH)
            assert result.holds, f"{case}: {result}"
            old = 2 * beat + 10 * LATENCY  # as old may be what one of them knows: many steps, if they are of 1 ms
            behind = max(0.0, apart(members) - (old if step == 0.001 else 0.0)) / slow
            assert behind <= 1 + workers * prefetch, case
            if step == 0.03 and batches >= 100:
                assert behind <= 5, case  # however long the queues


def test_queues_are_filled_when_the_speeds_are_known() -> None:
    board, members = crew([0.03, 0.15], workers=4, prefetch=8)
    for epoch, (least, most) in enumerate([(12, 13), (32, 34)]):
        begin(members, 200 * BATCH, epoch)
        run(board, members, until=board.clock.time + START + 0.01)
        assert least * BATCH <= members[0].share.outstanding <= most * BATCH
        for member in members:
            member.share.rewind()
            member.queue.clear()
        run(board, members)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_spare_batch_is_refused_in_the_dark_and_only_there(ranks: int) -> None:
    _, members = crew([0.03] * ranks, workers=4, prefetch=8)
    begin(members, 16 * ranks * BATCH)
    share = members[0].share
    board = members[0].desk.board
    board.latency = 0.0
    got = []
    for _ in range(4):
        board.clock.time += 1.0
        got.append(len(at_once(share.next_batch(BATCH, spare=True))))
    assert got == ([BATCH] * 4 if ranks == 1 else [BATCH, BATCH, 0, 0])
    board.clock.time += 1.0
    assert len(at_once(share.next_batch(BATCH))) == BATCH


def test_the_start_of_the_workers_is_not_the_speed() -> None:
    pace = LoaderPace()
    pace.start(0.0)
    pace.completed(10, 5.0)
    assert pace.rate == 0
    pace.completed(10, 6.0)
    assert pace.rate == 10
    pace.stop()
    pace.start(9.0)
    pace.completed(10, 19.0)
    assert pace.rate == 10


def test_the_only_batch_of_an_epoch_is_a_speed_for_the_next() -> None:
    pace = LoaderPace()
    pace.start(0.0)
    pace.completed(10, 5.0)
    pace.stop()
    assert pace.rate == 2
