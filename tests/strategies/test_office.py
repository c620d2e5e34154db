"""An office's clients of the store: soon told that there is none, and patient with a host that is frozen."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import DistNetworkError

from benchmarks.store import Held, Store
from lightning_async.strategies import office as office_module
from lightning_async.strategies import waiting
from lightning_async.strategies.office import CONNECT, FAREWELL, FAREWELL_FAILED, Office
from lightning_async.strategies.waiting import PeerFailedError
from lightning_async.transport.control import Control
from lightning_async.transport.mail import Wait
from tests.transport.far_store import far_store
from tests.transport.worlds import BUSY


def _heard(office: Office) -> Wait[None]:
    while office.carrier.decided("a word") is None:
        yield "a word"


KNOBS: dict[str, Any] = {"silence": 2.0, "patience": 30.0, "limit": 60.0, "interface": "lo", "record": None}


def _open(office: Office, port: int) -> None:
    where: Any = SimpleNamespace(main_address="127.0.0.1", main_port=port)
    office.open(where, 0, 1, torch.device("cpu"), fitting=False)


def test_the_time_to_reach_the_store_does_not_bound_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host may be frozen for longer than that, and for longer than patience."""
    found: list[Any] = []
    prepare = Control._prepare
    monkeypatch.setattr(Control, "_prepare", lambda control, store: (found.append(store), prepare(control, store))[1])
    with closing(Store()) as store, closing(Office(**KNOBS)) as office:
        _open(office, store.port)
        office.carrier.propose("a word", b"")
        office.drive(_heard(office))
    assert [one.timeout > timedelta(days=1) > timedelta(seconds=CONNECT) for one in found] == [True]


def test_a_store_that_does_not_answer_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host is frozen: the system takes the connection, and torch would wait for the first word without end."""
    monkeypatch.setattr(office_module, "ANSWER", 0.2)
    monkeypatch.setattr(office_module, "CONNECT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        where = frozen.getsockname()
        office = Office(**{**KNOBS, "limit": 0.2})
        with pytest.raises(
            TimeoutError, match=rf"the store at 127.0.0.1:{where[1]} takes connections and has not answ"
        ):
            _open(office, where[1])
    assert not office.is_open


@pytest.mark.parametrize("limit", [math.inf, timedelta.max.total_seconds()])
def test_who_may_wait_for_ever_opens_at_once(limit: float) -> None:
    """No lock of Python's waits so long: what bounds a wait there is bounded itself."""
    with closing(Store()) as store, closing(Office(**{**KNOBS, "limit": limit})) as office:
        _open(office, store.port)
        assert office.is_open


def test_a_store_that_is_not_there_is_torchs_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(office_module, "CONNECT", 0.2)
    with closing(Held()) as nobody, pytest.raises(DistNetworkError):
        _open(Office(**KNOBS), nobody.port)


def test_who_ended_by_itself_says_good_bye_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to end while the store's host is frozen, a rank is gone before it is killed for being late."""
    monkeypatch.setattr(waiting, "UNHEARD", 0.1)
    office = Office(**KNOBS, grace=0.0)
    with far_store() as (host, port), closing(office):
        _open(office, port)
        control = next(thread for thread in threading.enumerate() if thread.name.startswith("control"))
        os.kill(host, signal.SIGSTOP)
        os.waitid(os.P_PID, host, os.WSTOPPED)  # on a busy machine it answers until then
        office.sigterm()
        with pytest.raises(SIGTERMException):
            office.drive(_heard(office))
        began = time.monotonic()
        office.close()
        assert time.monotonic() - began < FAREWELL_FAILED
        os.kill(host, signal.SIGCONT)
        control.join(BUSY)


def _two(port: int) -> tuple[Office, Office]:
    """The offices of two ranks of one run, who have heard of each other."""
    offices = Office(**KNOBS), Office(**KNOBS)
    where: Any = SimpleNamespace(main_address="127.0.0.1", main_port=port)
    for rank, office in enumerate(offices):
        office._run = "together"  # else rank 0 draws it and the default group brings it to all
        office.open(where, rank, 2, torch.device("cpu"), fitting=False)
    for office in offices:
        office.drive(_all_there(office))
    return offices


def _all_there(office: Office) -> Wait[None]:
    while len(office.carrier.live()) < 2:
        yield "the other one"


def _in_its(wait: Callable[[float], None], act: Callable[[], object], lap: int = 3) -> Callable[[float], None]:
    """`wait`, in whose third lap `act` happens."""
    laps = iter(range(1, lap + 1))

    def waited(timeout: float) -> None:
        if next(laps, 0) == lap:
            act()
        wait(timeout)

    return waited


def test_rank_0_leaves_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may host the store: it waits while another one lives and has said nothing."""
    left: list[Any] = []
    with closing(Store()) as store:
        first, other = _two(store.port)

        def leave() -> None:
            other.close()
            left.append(first._members)

        with closing(other), closing(first):
            carrier = first.carrier
            monkeypatch.setattr(carrier, "wait", _in_its(carrier.wait, leave))
            first.close()
    assert left == [None], "the other one was gone before rank 0 was"
    assert first._members == other._members == (0, 1)


def test_rank_0_waits_for_who_was_not_heard_of_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is busy, and would find no store."""
    with closing(Store()) as store:
        first, other = _two(store.port)
        with closing(other), closing(first):
            carrier = first.carrier
            monkeypatch.setattr(carrier, "live", lambda: (0,))
            monkeypatch.setattr(carrier, "wait", _in_its(carrier.wait, other.close))
            first.close()
            assert other._members == (0, 1), "rank 0 was gone before it was"


def test_the_others_leave_before_rank_0_has_come_to_its_end() -> None:
    with closing(Store()) as store:
        first, other = _two(store.port)
        with closing(first), closing(other):
            began = time.monotonic()
            other.close()
            assert time.monotonic() - began < FAREWELL


def test_a_failed_rank_lingers_until_rank_0_has_heard_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `popen` a child that exits non-zero gets rank 0 killed before it could say what happened."""
    heard: list[str] = []
    with closing(Store()) as store:
        first, other = _two(store.port)

        def hear() -> None:
            with pytest.raises(PeerFailedError, match="rank 1 stopped: ValueError: bad batch") as told:
                first.drive(_heard(first))
            heard.append(str(told.value))
            first.close()

        with closing(first), closing(other):
            carrier = other.carrier
            other.announce(ValueError("bad batch"))
            monkeypatch.setattr(carrier, "wait", _in_its(carrier.wait, hear))
            other.close()
    assert len(heard) == 1
