"""The tick table: forward of t - k + 1, backward of t - 2K + k + 1, in the words of the paper (k from 1)."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lightning_async.pipeline.schedule import Order, delay, drain, due, schedule, ticks, turns

SIZES = [(1, 3), (2, 1), (2, 5), (3, 4), (4, 9), (5, 2)]


@pytest.mark.parametrize("order", ["update_first", "forward_first"])
@pytest.mark.parametrize(("stages", "batches"), SIZES)
def test_the_papers_table(stages: int, batches: int, order: Order) -> None:
    expected = set()
    for t in range(1, 1000):
        for k in range(1, stages + 1):
            expected |= {(t, k, "F", b) for b in [t - k + 1] if 1 <= b <= batches}
            expected |= {(t, k, "B", b) for b in [t - 2 * stages + k + 1] if 1 <= b <= batches}
    done = list(schedule(stages, batches, order=order))
    assert {(w.tick, w.stage + 1, w.direction, w.batch) for w in done} == expected
    assert len(done) == 2 * stages * batches
    assert all(a.tick <= b.tick for a, b in pairwise(done))
    assert max(w.tick for w in done) == ticks(stages, batches)


def test_three_stages_as_drawn() -> None:
    rows = {s: [(w.direction, w.batch) for w in schedule(3, 4) if w.stage == s] for s in range(3)}
    assert rows[0] == [("F", 1), ("F", 2), ("F", 3), ("F", 4), ("B", 1), ("B", 2), ("B", 3), ("B", 4)]
    assert rows[1] == [("F", 1), ("F", 2), ("B", 1), ("F", 3), ("B", 2), ("F", 4), ("B", 3), ("B", 4)]
    assert rows[2] == [("F", 1), ("B", 1), ("F", 2), ("B", 2), ("F", 3), ("B", 3), ("F", 4), ("B", 4)]


@pytest.mark.parametrize("order", ["update_first", "forward_first"])
@pytest.mark.parametrize(("stages", "batches"), SIZES)
def test_turns_are_the_rows_of_the_table(stages: int, batches: int, order: Order) -> None:
    table = list(schedule(stages, batches, order=order))
    for stage in range(stages):
        row = [(w.direction, w.batch) for w in table if w.stage == stage]
        assert list(turns(stage, stages, batches, order=order)) == row


@pytest.mark.parametrize("order", ["update_first", "forward_first"])
@pytest.mark.parametrize(("stages", "batches"), SIZES)
def test_what_is_needed_was_passed_on_in_an_earlier_tick(stages: int, batches: int, order: Order) -> None:
    done = {(w.stage, w.direction, w.batch): w.tick for w in schedule(stages, batches, order=order)}
    for (stage, direction, batch), tick in done.items():
        if direction == "F" and stage:
            assert done[stage - 1, "F", batch] == tick - 1
        if direction == "B" and stage < stages - 1:
            assert done[stage + 1, "B", batch] == tick - 1
        assert done[stage, "B", batch] - done[stage, "F", batch] == delay(stage, stages)


def test_the_pipe_fills_again_after_a_drain() -> None:
    assert [due(batch, 4) for batch in range(1, 8)] == [0, 0, 0, 0, 1, 2, 3]
    assert list(drain(7, 4)) == [4, 5, 6, 7]
    assert [due(batch, 4, since=7) for batch in range(8, 14)] == [0, 0, 0, 0, 8, 9]
    assert list(drain(9, 4, since=7)) == [8, 9]
    assert list(drain(7, 4, since=7)) == []


def test_knobs() -> None:
    with pytest.raises(ValueError, match="at least 1 stage, got 0"):
        list(schedule(0, 3))
    with pytest.raises(ValueError, match="`order` must be 'update_first' or 'forward_first', got 'both'"):
        list(schedule(2, 3, order="both"))  # type: ignore[arg-type]
