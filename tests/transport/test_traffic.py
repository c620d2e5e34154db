"""Traffic is counted by peer and kind: what a body stands for, and for how long its slot was taken."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from lightning_async.transport.mail import KIND_NAMES, Message
from lightning_async.transport.slots import Here, Inbox, Slots
from lightning_async.transport.traffic import Count, numbers_in, plain


class Clock(Here):
    """A clock that is told the time."""

    time = 0.0

    def now(self) -> float:
        return self.time


@pytest.mark.parametrize(
    ("body", "numbers"),
    [
        (None, 0),
        (torch.zeros(10), 10),
        (torch.zeros(10, dtype=torch.bfloat16), 10),
        (torch.zeros(10, dtype=torch.uint8), 80),  # packed signs
        (torch.zeros(10, dtype=torch.int64), 10),
    ],
)
def test_what_a_body_stands_for(body: Tensor | None, numbers: int) -> None:
    assert numbers_in(body) == numbers


def test_a_slot_is_taken_from_the_post_to_the_fold() -> None:
    here = Clock()
    slots = Slots(1, inbox=Inbox(here=here), here=here, max_bytes=1000)
    here.time = 2.0
    assert slots.post(Message(16, torch.zeros(5)))
    here.time = 5.0
    slots.released((1,))
    assert slots.traffic[16].seconds_out == 3.0
    assert slots.traffic[16].numbers_out == 5
    here.time = 6.0
    assert slots.post(Message(16))
    here.time = 6.5
    slots.resume(received=2, unfolded=set(), limit=1000)  # a new connection tells that it was folded meanwhile
    assert slots.traffic[16].seconds_out == 3.5


def test_as_json_by_name_and_kinds_of_one_name_added() -> None:
    table = {1: {0: Count(messages_out=9), 2: Count(bytes_out=5), 3: Count(bytes_out=7), 16: Count(bytes_in=1)}}
    found = json.loads(json.dumps(plain(table, {**KIND_NAMES, 16: "ask"})))
    assert set(found["1"]) == {"headers", "rounds", "ask"}
    assert found["1"]["rounds"]["bytes_out"] == 12
    assert found["1"]["ask"]["bytes_in"] == 1
    assert set(plain(table, {})["1"]) == {"kind 0", "kind 2", "kind 3", "kind 16"}
