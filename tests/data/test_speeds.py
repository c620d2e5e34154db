"""A steady member's mean is its speed, whatever its first batch and its pauses were."""

from __future__ import annotations

import pytest
import torch

from lightning_async.data.ledger import Note
from lightning_async.data.speeds import MeanPace, Speeds, matmuls_per_second
from tests.data.epoch_bench import Clock, FakeBoard


def paced(*seconds: float, memory: float = 0.1) -> float:
    """Seconds a sample after batches of 10 samples that took so long."""
    pace, now = MeanPace(memory), 0.0
    pace.start(now)
    for passed in seconds:
        now += passed
        pace.completed(10, now)
    return 1 / pace.rate


def test_a_steady_member_is_as_fast_as_it_is() -> None:
    assert paced(2.0) == pytest.approx(0.2)
    assert paced(60.0, *[2.0] * 5) == pytest.approx(0.2)  # the first one warmed up


def test_few_batches_are_averaged_equally() -> None:
    assert paced(9.0, 1.0, 2.0, 3.0) == pytest.approx(0.2)


def test_the_measurement_never_ends() -> None:
    assert paced(*[1.0] * 500, *[3.0] * 100) == pytest.approx(0.3, rel=1e-3)
    assert paced(*[3.0] * 500, *[1.0] * 100) == pytest.approx(0.1, rel=1e-3)


def test_a_pause_counts_as_four_batches_at_most() -> None:
    assert paced(*[1.0] * 50, 600.0) == pytest.approx(0.1 * (1 + 0.1 * 3))


def test_unknown_speed_is_none() -> None:
    assert MeanPace(0.1).rate == 0


def note(rate: float) -> bytes:
    return Note(0, 8, rate).pack()


def test_nominal_speeds_until_others_are_measured() -> None:
    board = FakeBoard(Clock(), 3)
    desks = board.desks()
    speeds = Speeds(desks[0], [1.0, 0.5, 0.25])
    assert speeds.seconds([0, 1, 2]) == [1.0, 2.0, 4.0]
    desks[1].publish(note(10.0))
    assert speeds.seconds([0, 1, 2]) == [1 / 20, 1 / 10, 1 / 5]
    desks[2].publish(note(1.0))
    assert speeds.seconds([1, 2]) == [1 / 10, 1.0]


def test_a_nominal_speed_for_each_rank() -> None:
    with pytest.raises(ValueError, match="`nominal` has 2 speeds, and there is a rank 2: give one a rank"):
        Speeds(FakeBoard(Clock(), 3).desks()[0], [1.0, 1.0]).seconds([0, 1, 2])


def test_probes_are_waited_for_once() -> None:
    desks = FakeBoard(Clock(), 2).desks()
    speeds = [Speeds(desk, "probe", lambda mine=desk.me: 100.0 * (1 + mine)) for desk in desks]
    assert speeds[0].missing([0, 1]) == [1]
    assert speeds[1].missing([0, 1]) == []
    assert speeds[0].missing([0, 1]) == []
    assert speeds[0].seconds([0, 1]) == speeds[1].seconds([0, 1])


def test_speeds_are_remembered_in_place_of_a_probe() -> None:
    desks = FakeBoard(Clock(), 2).desks()
    desks[0].publish(note(4.0))
    desks[1].publish(note(1.0))
    memory = Speeds(desks[0], "probe").memory()
    assert memory.dtype == torch.float64
    later = Speeds(FakeBoard(Clock(), 2).desks()[1], "probe")
    later.recall(memory)
    assert later.missing([0, 1]) == []
    assert later.seconds([0, 1]) == [0.25, 1.0]


def test_a_probe_is_short_and_positive() -> None:
    assert matmuls_per_second(0.01) > 0
