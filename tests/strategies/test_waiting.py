"""Whoever waits says for what, stops at its limit, and stops when the run is stopped."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_async.data.share import make_share
from lightning_async.strategies import waiting
from lightning_async.strategies.waiting import UNHEARD, Flags, PeerFailedError, drive
from lightning_async.transport.mail import Wait
from lightning_async.transport.rounds import Rounds
from lightning_async.transport.siblings import Siblings
from tests.data.epoch_bench import Clock, FakeBoard


def carrier(**decided: bytes) -> Any:
    return SimpleNamespace(me=0, decided=decided.get, wait=lambda seconds: None)


def patient(n: int) -> Wait[int]:
    for k in range(n):
        yield f"thing {k}"
    return n


def test_the_result_comes_back() -> None:
    assert drive(patient(3), Flags(carrier()), limit=60.0) == 3


def test_what_was_waited_for_is_counted() -> None:
    slow = SimpleNamespace(me=0, decided=lambda key: None, wait=lambda seconds: time.sleep(0.01))
    flags = Flags(slow)  # type: ignore[arg-type]
    drive(patient(3), flags, limit=60.0)
    assert 0.03 <= flags.waited <= flags.spent
    drive(patient(0), flags, limit=60.0)
    assert flags.spent - flags.waited < 0.03


def test_waiting_ends_with_what_was_missing() -> None:
    share = make_share("claim", FakeBoard(Clock(), 1, latency=1.0).desks()[0], batch=8)
    share.begin_epoch(3, total=40)
    with pytest.raises(TimeoutError, match="waited 0 s for the opening of epoch 3; the limit is 0 s"):
        drive(share.next_batch(8), Flags(carrier()), limit=0.0)


def test_who_waits_in_vain_says_for_whom_and_for_what_and_what_to_do() -> None:
    alone = SimpleNamespace(
        me=0, world=2, decided={}.get, wait=lambda seconds: None, members=lambda: (0, 1), propose=lambda key, word: None
    )
    wanted = r"rank 0 waited 0 s for rank \d to come to 'where to save' \(round0/1\); .* raise `meeting_timeout`"
    with pytest.raises(TimeoutError, match=wanted):
        drive(Rounds(alone).agree(b"", what="where to save"), Flags(alone), limit=0.0)  # type: ignore[arg-type]


def test_a_rank_that_is_told_to_end_ends_where_the_board_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's host may be frozen, and then nobody can decide that the run is to stop."""
    clock = [100.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[0])
    mute = SimpleNamespace(me=0, decided=lambda key: None, propose=lambda key, word: None, members=lambda: (0, 1))
    flags = Flags(mute, grace=5.0)  # type: ignore[arg-type]
    flags.raise_if_set()
    flags.sigterm = True
    for _ in range(3):
        flags.raise_if_set()
        clock[0] += 2.0
    clock[0] += UNHEARD
    with pytest.raises(SIGTERMException):
        flags.raise_if_set()


def test_who_does_not_come_to_its_end_within_the_grace_is_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nobody waits for its disk; who has met in time, or has nobody to meet, has time for it."""
    clock = [100.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[0])
    for patient, seconds, overdue in ((False, 9.0, False), (True, 9.0, True)):
        flags = Flags(carrier(stop=b"1"), grace=5.0, patient=lambda patient=patient: patient)
        if patient:
            flags.raise_if_set()
        clock[0] += seconds
        with pytest.raises(SIGTERMException):
            flags.raise_if_set()
        assert flags.overdue == overdue


def test_a_death_is_told_once_by_the_first_that_lives(caplog: pytest.LogCaptureFixture) -> None:
    living = {"decided": lambda key: None, "members": lambda: (1, 2), "deaths": {0: "silent for 31.0 s"}}
    for me in (1, 2):
        flags = Flags(SimpleNamespace(me=me, **living))  # type: ignore[arg-type]
        flags.raise_if_set()
        flags.raise_if_set()
    assert [r.getMessage() for r in caplog.records] == ["rank 0 is dead: silent for 31.0 s. Left: rank 1, 2"]


def test_waiting_ends_when_the_run_is_stopped() -> None:
    with pytest.raises(PeerFailedError, match="rank 1 stopped"):
        drive(patient(3), Flags(carrier(abort=b"rank 1 stopped")), limit=60.0)
    with pytest.raises(SIGTERMException):
        drive(patient(3), Flags(carrier(stop=b"1")), limit=60.0)


def test_a_fault_of_this_rank_stops_all_and_its_death_in_the_eyes_of_the_others_does_not() -> None:
    said: list[tuple[str, bytes]] = []
    living = {"me": 2, "decided": lambda key: None, "propose": lambda key, value: said.append((key, value))}
    dead = Flags(SimpleNamespace(**living, failed="declared dead", fault=None))  # type: ignore[arg-type]
    with pytest.raises(PeerFailedError, match="rank 2 cannot go on: declared dead") as error:
        dead.raise_if_set()
    dead.announce(error.value)
    assert said == []
    fault = RuntimeError("the service failed: KeyError: 3")
    faulty = Flags(SimpleNamespace(**living, failed=str(fault), fault=fault))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError) as own:
        drive(patient(3), faulty, limit=60.0)
    assert own.value is fault
    faulty.announce(own.value)
    assert said == [("abort", b"rank 2 stopped: RuntimeError: the service failed: KeyError: 3")]


def test_waits_inside_of_a_member_have_a_limit_and_name_the_rank() -> None:
    alone = SimpleNamespace(
        me=0,
        decided=lambda key: None,
        wait=lambda seconds: None,
        post=lambda peer, message: False,
        take=lambda kind: [],
    )
    siblings = Siblings(alone, (0, 1))  # type: ignore[arg-type]
    with pytest.raises(
        TimeoutError, match="rank 0 waited 0 s for rank 1, of the same member, in average 1 inside of it"
    ):
        drive(siblings.average(torch.zeros(2)), Flags(alone), limit=0.0)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError, match="for rank 1, of the same member, to hear 'whether a meeting follows'"):
        drive(siblings.word("whether a meeting follows", True), Flags(alone), limit=0.0)  # type: ignore[arg-type]


def test_a_rank_stops_with_a_dead_one_of_its_member_and_with_no_other() -> None:
    dead = SimpleNamespace(me=2, decided=lambda key: None, members=lambda: (0, 2), deaths={3: "its connection closed"})
    Flags(dead, siblings=(4,)).raise_if_set()  # type: ignore[arg-type]
    flags = Flags(dead, siblings=(3,))  # type: ignore[arg-type]
    with pytest.raises(
        PeerFailedError, match=r"rank 3 is dead \(its connection closed\), and rank 2 of the same member"
    ):
        flags.raise_if_set()
    assert flags.orphaned
