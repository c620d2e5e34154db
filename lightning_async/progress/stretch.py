"""A stretch is the time from one meeting to the next, as one rank spent it; its seconds add up to the clock's.

set off |--- compute ---|-x-|--- compute ---|w|--- compute ---|x| meets |..... idle .....|
        x: exchanging in the training thread          w: waiting for others between meetings
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lightning_async.progress.tally import ZERO, Tally


def _nothing() -> Iterable[float]:
    """Replicas that are always equal are nowhere apart."""
    return ()


@dataclass(frozen=True)
class Stretch:
    """What a rank did since the last meeting.

    Attributes:
        trained: What it trained on.
        seconds: From setting off to coming to this meeting.
        exchange: Seconds of these in which its training thread exchanged, rather than computed.
        waited: Seconds of these in which it waited for others. An asynchronous method has none, but for its data.
        idle: Seconds in which it waited for others at this meeting.
        until: Seconds from the start of the training to this meeting.
        apart: Computes how far this rank's weights were from the consensus: the sum of squares of each trainable
            parameter, in the order of the module. It may be asked while the meeting lasts.
    """

    trained: Tally = ZERO
    seconds: float = 0.0
    exchange: float = 0.0
    waited: float = 0.0
    idle: float = 0.0
    until: float = 0.0
    apart: Callable[[], Iterable[float]] = _nothing

    @property
    def compute(self) -> float:
        """Seconds in which it trained."""
        return max(0.0, self.seconds - self.exchange - self.waited)
