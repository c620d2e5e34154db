"""What a member tells the others of its own progress: in its note all the time, and as its word at a meeting.

note at 10.0 s: 40 batches, 8 a second        as seen at 10.5 s: 44 batches, 8 a second
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Flag, auto

from lightning_async.progress.appointment import Sight
from lightning_async.progress.tally import ZERO, Tally, Unit

_REPORT = struct.Struct("<QQQfffBBQIBQQI")
FORESIGHT = 1.0
"""Seconds for which a report is carried forward: whoever says nothing for longer may stand still."""


class Wish(Flag):
    """What a member asks all to do at the next meeting."""

    NOTHING = 0
    STOP = auto()
    SAVE = auto()
    REQUEUE = auto()
    TERMINATE = auto()
    VALIDATE = auto()


@dataclass(frozen=True, slots=True)
class Report:
    """One member's progress, in its own batches and updates: `weighed` is what they count for in the run.

    Attributes:
        tally: What it trained on in this run.
        rates: What it adds in a second, in each unit; 0 while unknown.
        ended: Whether it has nothing more to train on in this epoch.
        wishes: What it asks for.
        meetings: How many meetings it had had when it said so.
        batch: Its samples of a batch, as far as it knows.
        kept: The unit and the target of the appointment of which it has done its part; a target of 0 for none.
        whole: How many steps of the run the epoch counts for, if nothing of it is left for this member; else 0.
        weight: What each of its batches and updates counts for.
    """

    tally: Tally = ZERO
    rates: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ended: bool = False
    wishes: Wish = Wish.NOTHING
    meetings: int = 0
    batch: int = 1
    kept: tuple[int, int] = (0, 0)
    whole: int = 0
    weight: int = 1

    @property
    def weighed(self) -> Tally:
        """What it trained on, as the run counts it."""
        return self.tally.times(self.weight)

    def weighs(self, unit: Unit) -> int:
        """What one of this unit counts for."""
        return 1 if unit == Unit.SAMPLES else self.weight

    def pack(self) -> bytes:
        """As bytes, for notes and rounds."""
        return _REPORT.pack(
            *self.tally,
            *self.rates,
            self.ended,
            self.wishes.value,
            self.meetings,
            self.batch,
            *self.kept,
            self.whole,
            self.weight,
        )

    @classmethod
    def unpack(cls, value: bytes) -> Report:
        """The reverse of `pack`."""
        batches, updates, samples, b, u, s, ended, wishes, meetings, batch, *more = _REPORT.unpack(value)
        unit, target, whole, weight = more
        tally, kept = Tally(batches, updates, samples), (unit, target)
        return cls(tally, (b, u, s), bool(ended), Wish(wishes), meetings, batch, kept, whole, weight)

    def sight(self, unit: Unit, *, age: float, live: bool, most: float = 0.0) -> Sight:
        """This member as it will be by now; `most`: batches a second that one can have at most who has told none."""
        goes_on = live and not self.ended
        rate = self.rates[unit] or most * (self.batch if unit == Unit.SAMPLES else 1)
        ahead = self.rates[unit] * min(age, FORESIGHT) if goes_on else 0.0
        return Sight(self.tally[unit] + ahead, rate, goes_on, self.weighs(unit))
