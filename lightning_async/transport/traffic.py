"""What a carrier counts of its traffic, by peer and by kind of message.

post |----------- under way: the slot is taken -----------| folded          seconds_out
      numbers_out: what the body stands for        bytes_out: what went over the wire
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

HEADERS = 0
"""The row of the traffic table that counts headers; no message has this kind."""


@dataclass(slots=True)
class Count:
    """Traffic of one kind with one peer.

    Attributes:
        messages_out: Messages sent.
        bytes_out: Their payload in bytes (for the row `HEADERS`: header bytes).
        messages_in: Messages received.
        bytes_in: Their payload.
        numbers_out: How many numbers the bodies that were posted stand for.
        seconds_out: Seconds for which the slot was taken: from each post until its receiver had folded it (for the row
            `HEADERS`: seconds in which any slot was).
    """

    messages_out: int = 0
    bytes_out: int = 0
    messages_in: int = 0
    bytes_in: int = 0
    numbers_out: int = 0
    seconds_out: float = 0.0


def numbers_in(body: Tensor | None) -> int:
    """How many numbers a body stands for: a byte of packed signs for eight."""
    if body is None:
        return 0
    return body.numel() * (8 if body.dtype.itemsize == 1 and not body.dtype.is_floating_point else 1)


def plain(traffic: Mapping[int, Mapping[int, Count]], kinds: Mapping[int, str]) -> dict[str, Any]:
    """A traffic table as JSON holds it: by peer, then by the name of the kind. Kinds of one name are added up."""
    table: dict[str, Any] = {}
    for peer, counts in traffic.items():
        row = table.setdefault(str(peer), {})
        for kind, count in counts.items():
            name = kinds.get(kind, f"kind {kind}")
            before = row.get(name, {})
            row[name] = {key: round(value + before.get(key, 0), 6) for key, value in asdict(count).items()}
    return table
