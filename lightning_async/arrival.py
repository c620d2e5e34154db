"""An arrival says what was folded into a replica, from whom, and how late: every remote update carries its delay."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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
        peer: The rank that sent it.
        base: The version (server) or step (peer to peer) the sender started from.
        launched: The receiver's own step when the message was launched, as the sender had last heard it.
        folded: The receiver's own step at the fold.
        seconds: An upper bound on the message's age, by the receiver's clock alone.
        samples: How many samples the correction stands for.
        factor: The shrink that was applied, 1 where nothing was shrunk.
        fate: What became of it.
    """

    peer: int
    base: int
    launched: int
    folded: int
    seconds: float
    samples: int = 0
    factor: float = 1.0
    fate: Fate = Fate.FOLDED

    @property
    def delay(self) -> int:
        """Steps of the receiver between launch and fold; an upper bound that needs no common clock."""
        return self.folded - self.launched
