"""What callbacks and users may see of a strategy is the same for each: arrivals, traffic, steps, the last meeting.

arrivals()   what came, from whom, how late        traffic()   bytes and messages by peer and kind
shrink       the one thing that they may set: by how much a late contribution counts less
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_async.algorithms.algorithm import Algorithm, Shrink
from lightning_async.arrival import Arrival
from lightning_async.strategies.consensus import Consensus
from lightning_async.strategies.saving import Saving
from lightning_async.strategies.stepping import Stepping


class Shown(Saving):
    """The face of every asynchronous strategy.

    Attributes:
        algorithm: What is computed and exchanged.
        stepping: This rank's steps.
        consensus: This rank's way to meetings and back.
    """

    algorithm: Algorithm
    stepping: Stepping
    consensus: Consensus

    def arrivals(self, reader: object = None) -> list[Arrival]:
        """What reached this rank since this reader's last call. A callback passes itself, so that each sees all."""
        return self.stepping.arrivals(reader)

    def traffic(self) -> Mapping[Any, Any]:
        """Bytes and messages by peer and kind, counted by the carrier."""
        return self.office.traffic()

    @property
    def last_meeting(self) -> dict[str, float]:
        """How far apart the replicas were before the last meeting ("spread"), and how long it took ("seconds")."""
        return self.consensus.last

    @property
    def steps(self) -> int:
        """How many steps this rank has taken."""
        return self.stepping.taken

    @property
    def skipped_steps(self) -> int:
        """How many of this rank's steps moved nothing, because fp16's gradient scaler found them not finite."""
        return self.stepping.skipped.count

    @property
    def shrink(self) -> Shrink:
        """Asked before every fold for a factor in (0, 1]; assign a function to shrink late contributions."""
        return self.algorithm.shrink

    @shrink.setter
    def shrink(self, law: Shrink) -> None:
        self.algorithm.shrink = law
