"""An office's clients of the store: soon told that there is none, and patient with a host that is frozen."""

from __future__ import annotations

from contextlib import closing
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.store import Store
from lightning_async.strategies.office import CONNECT, Office
from lightning_async.transport.control import Control
from lightning_async.transport.mail import Wait


def _heard(office: Office) -> Wait[None]:
    while office.carrier.decided("a word") is None:
        yield "a word"


def test_the_time_to_reach_the_store_does_not_bound_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host may be frozen for longer than that, and for longer than patience."""
    found: list[Any] = []
    prepare = Control._prepare
    monkeypatch.setattr(Control, "_prepare", lambda control, store: (found.append(store), prepare(control, store))[1])
    knobs: dict[str, Any] = {"silence": 2.0, "patience": 30.0, "limit": 60.0, "interface": "lo", "record": None}
    with closing(Store()) as store, closing(Office(**knobs)) as office:
        where: Any = SimpleNamespace(main_address="127.0.0.1", main_port=store.port)
        office.open(where, 0, 1, torch.device("cpu"), fitting=False)
        office.carrier.propose("a word", b"")
        office.drive(_heard(office))
    assert [one.timeout > timedelta(days=1) > timedelta(seconds=CONNECT) for one in found] == [True]
