"""An arrival says what was folded into a replica, from whom, and how late: every remote update carries its delay."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice


class Fate(str, Enum):
    """What became of a message at its receiver."""

    FOLDED = "folded"
    SHRUNK = "shrunk"
    REFUSED = "refused"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message that reached a member.

    Attributes:
        peer: The rank that sent it; what a rank pushed to a server it tells of itself, with its own rank.
        base: The version (server) or step (peer to peer) the sender started from.
        launched: The receiver's own step when the message was launched, as the sender had last heard it.
        folded: The receiver's own step at the fold.
        seconds: An upper bound on the message's age, by the receiver's clock alone.
        samples: How many samples the correction stands for.
        factor: The shrink that was applied, 1 where nothing was shrunk.
        fate: What became of it.
        owner: The rank whose shard it was merged into; -1 where the one that tells merged it.
    """

    peer: int
    base: int
    launched: int
    folded: int
    seconds: float
    samples: int = 0
    factor: float = 1.0
    fate: Fate = Fate.FOLDED
    owner: int = -1

    @property
    def other(self) -> int:
        """The rank at the other end of the exchange: who owns the shard, or who sent."""
        return self.peer if self.owner < 0 else self.owner

    @property
    def delay(self) -> int:
        """Steps of the receiver between launch and fold; an upper bound that needs no common clock."""
        return self.folded - self.launched

    def refused(self) -> Arrival:
        """The same, turned away."""
        return replace(self, fate=Fate.REFUSED, factor=0.0)

    def shrunk(self, factor: float) -> Arrival:
        """The same, folded with this factor."""
        return self if factor == 1 else replace(self, fate=Fate.SHRUNK if factor < 1 else Fate.FOLDED, factor=factor)


class ArrivalLog:
    """The newest arrivals, for several readers: each gets all since its own last call, up to `limit`."""

    def __init__(self, limit: int = 65536) -> None:
        self._newest: deque[Arrival] = deque(maxlen=limit)
        self._count = 0
        self._read: dict[int, int] = {}

    def add(self, arrivals: Iterable[Arrival]) -> None:
        """Enter what arrived."""
        for arrival in arrivals:
            self._newest.append(arrival)
            self._count += 1

    def read(self, reader: object = None) -> list[Arrival]:
        """What this reader has not seen."""
        new = min(self._count - self._read.get(id(reader), 0), len(self._newest))
        self._read[id(reader)] = self._count
        return list(islice(reversed(self._newest), new))[::-1]
