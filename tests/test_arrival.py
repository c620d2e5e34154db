"""Arrivals: the delay is what the receiver felt, and each reader of the log sees every arrival once."""

from __future__ import annotations

from dataclasses import replace

from lightning_async.arrival import Arrival, ArrivalLog


def arrival(folded: int) -> Arrival:
    return Arrival(peer=1, base=0, launched=2, folded=folded, seconds=0.1)


def test_the_delay_is_counted_in_the_receivers_steps() -> None:
    assert arrival(7).delay == 5


def test_the_other_end_is_the_sender_or_who_owns_what_was_pushed_to() -> None:
    assert arrival(7).other == 1
    assert replace(arrival(7), owner=0).other == 0


def test_each_reader_sees_all_once() -> None:
    log, one, two = ArrivalLog(), object(), object()
    log.add([arrival(3), arrival(4)])
    assert [a.folded for a in log.read(one)] == [3, 4]
    log.add([arrival(5)])
    assert [a.folded for a in log.read(one)] == [5]
    assert [a.folded for a in log.read(two)] == [3, 4, 5]
    assert log.read(two) == []


def test_the_log_is_bounded() -> None:
    log = ArrivalLog(limit=2)
    log.add(arrival(k) for k in range(5))
    assert [a.folded for a in log.read()] == [3, 4]
